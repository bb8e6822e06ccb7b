"""The study's settings: a schema of dataclasses, filled from the YAML in ``study/conf``.

Every field is one override on the command line (``distill.optimizer.lr=3e-4``). The schema holds
types and meaning, the YAML holds values, so that no default is written twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class InputError(ValueError):
    """A setting, file or argument that its user can mend; the message says how."""


@dataclass
class SplitConfig:
    annotations: str
    """COCO-format keypoint JSON, relative to ``data.root``."""
    images: str
    """Folder of the pictures, relative to ``data.root``."""


@dataclass
class DataConfig:
    kind: str
    """drawn | coco | crowdpose: which evaluation and which official selection of people."""
    root: str
    train: SplitConfig
    val: SplitConfig
    skeleton: str
    """coco (17 joints) | crowdpose (14 joints)."""
    input_size: tuple[int, int]
    """(height, width) of the person crop that networks see, px; both divisible by 32."""
    search_fraction: float
    """Share of the training pictures held out to score trials on."""
    max_bad_fraction: float
    """Share of people that may be faulty and are then left out; above it the study stops."""
    max_people: int
    """Train on at most so many people, drawn at random (0 = all)."""
    train_pictures: int
    """data=drawn: how many training pictures to draw."""
    val_pictures: int
    """data=drawn: how many validation pictures to draw."""
    seed: int
    """data=drawn: which pictures are drawn; also which pictures are held out."""


@dataclass
class ModelConfig:
    name: str
    """Architecture: mobile_net."""
    size: str
    """tiny | teacher."""
    codec: str
    """msra | dark."""
    sigma: float
    """Spread of the target Gaussian, heatmap cells."""
    init: str
    """random, or the path of weights (safetensors) to start from."""


@dataclass
class OptimizerConfig:
    """AdamW; the rate rises over the warm-up and falls as a cosine to zero."""

    lr: float
    weight_decay: float
    warmup_fraction: float
    """Share of all steps over which the rate rises."""
    pretrained_factor: float
    """Layers that start from trained weights take this share of the rate."""


@dataclass
class TeacherConfig(ModelConfig):
    epochs: int
    """0 uses ``teacher.init`` as it is."""
    batch_size: int
    optimizer: OptimizerConfig


@dataclass
class HeatmapTermConfig:
    kind: str
    """none | mse | kl."""
    weight: float
    tau: float
    """Temperature of kl's softmax."""


@dataclass
class StructureTermConfig:
    kind: str
    """none | pairwise | bone | relation."""
    weight: float


@dataclass
class AugmentConfig:
    """Drawn anew for each person and epoch, in the ranges of the official HRNet."""

    scale: float
    """The crop grows or shrinks by a normal factor of this spread, cut at one spread."""
    rotation: float
    """Degrees; a normal of this spread, cut at two spreads, in 60 % of the people."""
    flip: float
    """Probability of a mirror."""
    half_body: float
    """Probability of a crop about the upper or the lower body alone."""
    colour: float
    """Spread of brightness and contrast."""


@dataclass
class DistillConfig:
    """Stage 1, coarse: the teacher's heatmaps and structure teach the student."""

    epochs: int
    batch_size: int
    optimizer: OptimizerConfig
    heatmap: HeatmapTermConfig
    structure: StructureTermConfig
    schedule: str
    """constant | linear | ramp: how the teacher's share goes over the epochs."""
    normalize: str
    """initial: every term is divided by its mean before training, so that weights compare."""
    augment: AugmentConfig


@dataclass
class RefineConfig:
    """Stage 2, fine: IGP-GCN moves the student's joints, level by level."""

    epochs: int
    """0 leaves stage 2 out."""
    batch_size: int
    optimizer: OptimizerConfig
    levels: int
    depth: int
    """Residual graph blocks in each level."""
    width: int
    dropout: float
    gate: bool
    loss: str
    """oks | smooth_l1."""
    progressive: str
    """final | interpolated: what each level is supervised by."""
    teacher_weight: float
    truth_weight: float
    perturb: bool
    """Give the student's pose, in training, the errors it makes on people it has not seen."""
    augment: AugmentConfig


@dataclass
class SearchConfig:
    trials: int
    """Finished trials, controls included, at which the search ends."""
    concurrent: int
    """Trials at once; 0 = as many as the machine has room for."""
    startup_trials: int
    """Trials drawn at random before the sampler models anything."""
    pruner: str
    """successive_halving | none."""
    min_epochs: int
    """Epochs before a trial can be pruned."""
    reduction_factor: int


@dataclass
class TrialConfig:
    launcher: str
    """auto | inline | train. auto: one CPU worker inline, everything else under Ray Train."""
    num_workers: int
    cpus: float
    """CPUs of a worker."""
    gpus: float
    """GPUs of a worker."""
    max_failures: int
    """How often a trial that broke goes on from its checkpoint before it counts as failed."""


@dataclass
class StudyConfig:
    name: str
    """The study's folder under ``storage``."""
    storage: str
    """Folder of all studies and of what they share."""
    seed: int
    plan: str
    """joint: a trial is stage 1, then stage 2."""
    search_space: str
    """distill | refine | joint | smoke, or the path of a YAML of your own."""
    display: str
    """auto | live | plain | none."""
    data: DataConfig
    teacher: TeacherConfig
    student: ModelConfig
    distill: DistillConfig
    refine: RefineConfig
    search: SearchConfig
    trial: TrialConfig


MAY_CHANGE = ("search.trials", "search.concurrent", "trial", "display")
"""Settings that may differ when an existing study is run again."""

CHOICES: dict[str, tuple[str, ...]] = {
    "plan": ("joint",),
    "display": ("auto", "live", "plain", "none"),
    "data.kind": ("drawn", "coco", "crowdpose"),
    "data.skeleton": ("coco", "crowdpose"),
    "teacher.name": ("mobile_net",),
    "student.name": ("mobile_net",),
    "teacher.size": ("tiny", "teacher"),
    "student.size": ("tiny", "teacher"),
    "teacher.codec": ("msra", "dark"),
    "student.codec": ("msra", "dark"),
    "distill.heatmap.kind": ("none", "mse", "kl"),
    "distill.structure.kind": ("none", "pairwise", "bone", "relation"),
    "distill.schedule": ("constant", "linear", "ramp"),
    "distill.normalize": ("initial", "none"),
    "refine.loss": ("oks", "smooth_l1"),
    "refine.progressive": ("final", "interpolated"),
    "search.pruner": ("successive_halving", "none"),
    "trial.launcher": ("auto", "inline", "train"),
}

AT_LEAST: dict[str, float] = {
    "data.max_people": 0,
    "data.max_bad_fraction": 0,
    "data.train_pictures": 2,
    "data.val_pictures": 1,
    "teacher.epochs": 0,
    "distill.epochs": 1,
    "refine.epochs": 0,
    "refine.teacher_weight": 0,
    "refine.truth_weight": 0,
    "refine.width": 4,
    "search.trials": 1,
    "search.concurrent": 0,
    "search.startup_trials": 1,
    "search.min_epochs": 1,
    "search.reduction_factor": 2,
    "trial.num_workers": 1,
    "trial.gpus": 0,
    "trial.max_failures": 0,
    **{f"{stage}.batch_size": 1 for stage in ("teacher", "distill", "refine")},
    **{f"{stage}.optimizer.weight_decay": 0 for stage in ("teacher", "distill", "refine")},
    **{
        f"{stage}.augment.{name}": 0
        for stage in ("distill", "refine")
        for name in ("scale", "rotation", "colour")
    },
}

POSITIVE = (
    *(f"{stage}.optimizer.lr" for stage in ("teacher", "distill", "refine")),
    *("student.sigma", "teacher.sigma", "trial.cpus"),
    *("distill.heatmap.weight", "distill.heatmap.tau", "distill.structure.weight"),
)

WITHIN: dict[str, tuple[float, float]] = {
    "refine.levels": (1, 3),
    "refine.depth": (1, 6),
    "refine.dropout": (0, 0.9),
    **{
        f"{stage}.optimizer.warmup_fraction": (0, 0.9)
        for stage in ("teacher", "distill", "refine")
    },
    **{
        f"{stage}.optimizer.pretrained_factor": (0, 1)
        for stage in ("teacher", "distill", "refine")
    },
    **{
        f"{stage}.augment.{name}": (0, 1)
        for stage in ("distill", "refine")
        for name in ("flip", "half_body")
    },
}


def compose(overrides: Sequence[str] = ()) -> StudyConfig:
    """The settings that the YAML and these ``key=value`` overrides give.

    Raises:
        InputError: an unknown key, a wrong type or an impossible value.
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("study.conf", version_base=None):
            composed = hydra.compose("study", overrides=list(overrides))
        return _fill(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error)) from None


def _fill(values: DictConfig) -> StudyConfig:
    """The schema filled with these values, all of them checked."""
    merged = OmegaConf.merge(OmegaConf.structured(StudyConfig), values)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, StudyConfig)
    check(config)
    return config


def with_values(config: StudyConfig, values: Mapping[str, Any]) -> StudyConfig:
    """The same settings but for these, given by config path; ``config`` itself stays as it is."""
    changed = OmegaConf.structured(config)
    for path, value in values.items():
        OmegaConf.update(changed, path, value)
    return _fill(changed)


def value_at(config: StudyConfig, path: str) -> Any:
    """The value at a config path.

    Raises:
        KeyError: the path names no single setting.
    """
    value: Any = config
    for part in path.split("."):
        if part not in getattr(value, "__dataclass_fields__", ()):
            raise KeyError(path)
        value = getattr(value, part)
    if hasattr(value, "__dataclass_fields__"):
        raise KeyError(path)
    return value


def to_plain(config: StudyConfig) -> dict[str, Any]:
    """The settings as nested dicts, lists and scalars, ready for YAML or JSON."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_plain(plain: Mapping[str, Any]) -> StudyConfig:
    """The settings that ``to_plain`` wrote."""
    try:
        return _fill(OmegaConf.create(dict(plain)))
    except OmegaConfBaseException as error:
        raise InputError(_explain(error)) from None


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict from config path to value."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_paths(config: StudyConfig) -> list[str]:
    """Every config path, in the schema's order."""
    return list(flatten(to_plain(config)))


def check(config: StudyConfig) -> None:
    """Returns if every value is possible.

    Raises:
        InputError: lists all that are not.
    """
    faults = [*_out_of_choice(config), *_out_of_bounds(config), *_impossible(config)]
    if faults:
        raise InputError("impossible settings:\n" + "\n".join(f"  {fault}" for fault in faults))


def _out_of_choice(config: StudyConfig) -> Iterable[str]:
    for path, choices in CHOICES.items():
        value = value_at(config, path)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{path} must be one of {', '.join(choices)}, got {path}={value}{hint}"


def _out_of_bounds(config: StudyConfig) -> Iterable[str]:
    for path, low in AT_LEAST.items():
        if not (value := value_at(config, path)) >= low:
            yield f"{path} must be at least {low:g}, got {path}={value}"
    for path in POSITIVE:
        if not (value := value_at(config, path)) > 0:
            yield f"{path} must be above 0, got {path}={value}"
    for path, (low, high) in WITHIN.items():
        if not low <= (value := value_at(config, path)) <= high:
            yield f"{path} must lie within {low:g} and {high:g}, got {path}={value}"


def _impossible(config: StudyConfig) -> Iterable[str]:
    data, trial = config.data, config.trial
    if not 0 < data.search_fraction < 1:
        yield (
            "data.search_fraction must lie between 0 and 1: it is the share of training pictures "
            f"held out to score trials on, got data.search_fraction={data.search_fraction}"
        )
    if any(side < 32 or side % 32 for side in data.input_size):
        yield (
            "data.input_size must be two multiples of 32, (height, width), "
            f"got data.input_size={list(data.input_size)}; try [256,192]"
        )
    if trial.launcher == "inline" and trial.num_workers > 1:
        yield (
            "trial.launcher=inline runs one worker in the trial's own process, got "
            f"trial.num_workers={trial.num_workers}; change to trial.launcher=train"
        )
    if config.teacher.epochs == 0 and config.teacher.init == "random":
        yield (
            "a teacher must be trained or loaded, got teacher.epochs=0 and teacher.init=random; "
            "set teacher.epochs, or teacher.init to the path of its weights"
        )
    if not re.fullmatch(r"[\w.+-]+", config.name):
        yield (
            "name must be a folder's name of letters, digits, '.', '_', '+' and '-', "
            f"got name={config.name!r}"
        )
    if "://" in config.storage:
        yield (
            "storage must be a folder that every node can write to, "
            f"got storage={config.storage}; mount the bucket and give its path"
        )


def _explain(error: Exception) -> str:
    """What Hydra or OmegaConf found: one line that names the setting, where it is known."""
    text = f"{error}\n{error.__cause__ or ''}"
    found = re.search(r"override '\+*([\w.]+)'|full_key: ([\w.]+)", text)
    first = next(line.strip() for line in text.splitlines() if line.strip())
    if found is None:
        options = re.search(r"Available options in '\w+':\s*((?:\n?\s+\w+)+)", text)
        return f"{first}; choose from {', '.join(options.group(1).split())}" if options else first
    key = found.group(1) or found.group(2)
    if "not in" not in text:
        return f"{key}: {first}"
    near = difflib.get_close_matches(key, config_paths(compose()), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "python study/tune.py --help lists them"
    return f"unknown setting {key}; {hint}"
