"""The study's settings: a schema of dataclasses, filled from the YAML in ``study/conf``.

Every field is one override on the command line (``distill.optimizer.lr=3e-4``). The schema holds
types and meaning, the YAML holds values, so that no default is written twice.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from study import limits
from study.overrides import explain, fault_in


class InputError(ValueError):
    """A setting, file or argument that its user can mend; the message says how."""


@dataclass
class SplitConfig:
    """Training or validation: annotations and pictures."""

    annotations: str
    """COCO-format keypoint JSON, relative to ``data.root``."""
    images: str
    """Folder of the pictures, relative to ``data.root``."""


@dataclass
class DataConfig:
    """Whose poses a study learns, and how much of them."""

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
    """A network, the teacher or the student, and how its heatmaps are read."""

    name: str
    """Architecture: mobile_net."""
    size: str
    """tiny | small | medium | large | teacher; lightning | thunder: MoveNet."""
    codec: str
    """msra | dark; of the teacher also movenet: a MoveNet as it comes, by its own rule."""
    sigma: float
    """Spread of the target Gaussian, heatmap cells."""
    init: str
    """random, or the path of weights to start from: safetensors, or a MoveNet's TF.js .json."""


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
    """The network that teaches, trained once for all trials."""

    epochs: int
    """0 uses ``teacher.init`` as it is."""
    batch_size: int
    optimizer: OptimizerConfig


@dataclass
class HeatmapTermConfig:
    """The loss between the teacher's heatmaps and the student's."""

    kind: str
    """none | mse | kl."""
    weight: float
    tau: float
    """Temperature of kl's softmax."""


@dataclass
class StructureTermConfig:
    """The loss between the teacher's body structure and the student's."""

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
    """How many trials, and which of them are ended early."""

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
    """Where and on what one trial runs."""

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
    """All settings of one study."""

    name: str
    """The study's folder under ``storage``; auto: named for data, plan and search space."""
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


RANDOM = "random"
"""The ``init`` of a network that starts from no weights."""
MAY_CHANGE = ("search.trials", "search.concurrent", "trial", "display")
"""Settings that may differ when an existing study is run again."""


def compose(overrides: Sequence[str] = ()) -> StudyConfig:
    """The settings that the YAML and these ``key=value`` overrides give.

    Raises:
        InputError: an unknown key, a wrong type or an impossible value.
    """
    groups = {"data": data_groups()}
    for override in overrides:
        if fault := fault_in(override, _schema(), groups):
            raise InputError(fault)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("study.conf", version_base=None):
            composed = hydra.compose("study", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, _schema())) from None
    return _fill(composed)


def with_values(config: StudyConfig, values: Mapping[str, Any]) -> StudyConfig:
    """The same settings but for these, given by config path; ``config`` itself stays as it is.

    Raises:
        InputError: an unknown key, a wrong type or an impossible value.
    """
    try:
        changed = OmegaConf.structured(config)
        for path, value in values.items():
            OmegaConf.update(changed, path, value)
        return _checked(changed)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, _schema())) from None


def with_absolute_paths(config: StudyConfig) -> StudyConfig:
    """The same settings, of which the paths mean the same in every process.

    Ray's workers have working directories of their own.
    """
    paths = ["storage", "data.root"]
    paths += [
        path for path in ("teacher.init", "student.init") if value_at(config, path) != RANDOM
    ]
    absolute = {path: str(Path(value_at(config, path)).expanduser().absolute()) for path in paths}
    return with_values(config, absolute)


def _fill(values: DictConfig) -> StudyConfig:
    """The schema filled with these values, all of them checked."""
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(StudyConfig), values))
    except OmegaConfBaseException as error:
        raise InputError(explain(error, _schema())) from None


def _checked(values: Any) -> StudyConfig:
    config = OmegaConf.to_object(values)
    assert isinstance(config, StudyConfig)
    if config.name == "auto":
        space = Path(config.search_space).stem
        config.name = f"{config.data.kind}-{config.plan}-{space}"
    check(config)
    return config


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
    return asdict(config)


def from_plain(plain: Mapping[str, Any]) -> StudyConfig:
    """The settings that ``to_plain`` wrote.

    Raises:
        InputError: they are not this version's settings.
    """
    return _fill(OmegaConf.create(dict(plain)))


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
    faults = limits.faults(flatten(to_plain(config)))
    if faults:
        raise InputError("impossible settings:\n" + "\n".join(f"  {fault}" for fault in faults))


def data_groups() -> list[str]:
    """What ``data=`` may name, sorted."""
    folder = importlib.resources.files("study.conf.data")
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@functools.cache
def _schema(kind: type = StudyConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every setting, and of every section of them, by config path."""
    found: dict[str, Any] = {}
    for name, child in get_type_hints(kind).items():
        found[prefix + name] = child
        if is_dataclass(child):
            found |= _schema(child, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found
