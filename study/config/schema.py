"""The schema of a study's settings: their types and what each one means.

Every field is one override on the command line (``distill.optimizer.lr=3e-4``). Values are in
``study/config/*.yaml``, so that no default is written twice; ``config/checks.py`` says which
values are possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RANDOM = "random"
"""The ``init`` of a network that starts from no weights."""
SHARED_FOLDER = "cache"
"""Folder under ``storage`` that no study may have for its own."""
MIX = ("pairwise", "bone", "angle", "relation")
"""The parts of a mixed structure loss."""
MOBILE_NET, MOVENET = "mobile_net", "movenet"
MOVENET_SIZES = ("lightning", "thunder")
SIZES = {
    MOBILE_NET: ("tiny", "small", "medium", "large", "teacher", *MOVENET_SIZES),
    "hrnet": ("w18_small", "w18", "w32", "w48"),
    "simple_baseline": ("r18", "r50", "r101", "r152"),
}
"""The sizes of each network: ``teacher.name`` and ``teacher.size``, likewise ``student``."""
STUDENT, JITTER = "student", "jitter"
"""What ``refine.start`` may be beside the path of a JSON."""
JOINT, STAGED = "joint", "staged"
"""``plan.kind``."""
CACHED, ONLINE = "cached", "online"
"""``teacher.mode``."""
VITPOSE, ONNX, PREDICTIONS = "vitpose", "onnx", "predictions"
"""What may teach beside our own networks."""
TENSORBOARD, MLFLOW = "tensorboard", "mlflow"
"""What ``log`` may name."""
Kind = Literal["coco", "crowdpose"]
AP = "ap"
LATENCY, PARAMETERS = COSTS = ("latency_ms", "parameters")
"""What a trial costs: to be low, and known before it is trained."""
CONSTRAINTS = "search.constraints."


@dataclass
class SplitConfig:
    """Training or validation: annotations and images."""

    annotations: str
    """COCO-format keypoint JSON, relative to ``data.root``."""
    images: str
    """Folder of the images, relative to ``data.root``."""


@dataclass
class ValConfig(SplitConfig):
    """The official validation, which finalists alone are scored on, and by which rules."""

    detections: str | None
    """COCO detections JSON, relative to ``data.root``, whose boxes people are looked for in; null
    = the boxes of the ground truth."""
    detection_threshold: float
    """Boxes that score lower are left out."""
    oks_nms: float
    """Of two poses in an image more alike than this OKS the worse is dropped; 1 = none."""


@dataclass
class DataConfig:
    """Whose poses a study learns, and how much of them."""

    kind: str
    """drawn | coco | crowdpose: which evaluation and which official selection of people."""
    root: str
    """Folder of the data set."""
    train: SplitConfig
    val: ValConfig
    skeleton: str
    """coco (17 joints) | crowdpose (14 joints)."""
    input_size: tuple[int, int]
    """(height, width) of the person crop that networks see, px; both divisible by 32."""
    search_fraction: float
    """Share of the training images held out to score trials on."""
    max_bad_fraction: float
    """Share of people that may be faulty and are then left out; above it the study stops."""
    max_people: int
    """Train on at most so many people, drawn at random (0 = all)."""
    num_train_images: int
    """data=drawn: how many training images to draw."""
    num_val_images: int
    """data=drawn: how many validation images to draw."""
    seed: int
    """data=drawn: which images are drawn; also which images are held out."""
    crops: str
    """raw | jpeg | auto: how crops are stored; auto: raw up to 4 GB a study, above that jpeg."""
    store: str | None
    """Where crops are kept for all machines: a folder, s3://bucket/prefix or gs://bucket/prefix,
    from which each node fetches them once; null = ``storage``'s cache."""


@dataclass
class ModelConfig:
    """A network, the teacher or the student, and how its heatmaps are read."""

    name: str
    """Architecture: mobile_net | hrnet | simple_baseline; of the teacher also vitpose, onnx or
    predictions."""
    size: str
    """mobile_net: tiny | small | medium | large | teacher; lightning | thunder: MoveNet. hrnet, by
    width: w18_small | w18 | w32 | w48. simple_baseline, by the ResNet's depth: r18 | r50 | r101 |
    r152."""
    codec: str
    """msra | dark | udp | simcc; of the teacher also movenet: a MoveNet as it comes, by its own
    rule."""
    sigma: float
    """Spread of the target Gaussian, heatmap cells."""
    init: str
    """random, or the path of weights to start from: safetensors, what torch.save wrote, or a
    MoveNet's TF.js .json."""
    flip_test: bool
    """Average over each crop and its mirror image, whenever it is not being trained."""


@dataclass
class OptimizerConfig:
    """AdamW; the rate rises over the warm-up and falls as a cosine to zero."""

    lr: float
    """Highest learning rate."""
    weight_decay: float
    """AdamW's weight decay."""
    warmup_fraction: float
    """Share of all steps over which the rate rises."""
    pretrained_factor: float
    """Layers that start from trained weights take this share of the rate."""


@dataclass
class TeacherConfig(ModelConfig):
    """What teaches, made ready once for all trials: a network of ours or any other method.

    ``name`` may also be vitpose (``init`` is a folder with config.json and safetensors), onnx
    (``init`` is a file) or predictions (``init`` is a JSON of COCO keypoint results on the
    training images); those have no ``size``, and vitpose and predictions no codec either.
    """

    skeleton: str | None
    """Whose joints it knows, as in data.skeleton; null = the data's. The joints that the data lack
    are left out; of those that it lacks it teaches nothing, and they count as missed in its AP."""
    input_size: tuple[int, int] | None
    """(height, width) of the crop that it sees, px, both divisible by 32; null = the data's."""
    pixels: str
    """imagenet | unit: what an onnx file takes, RGB normalized as for ImageNet, or in 0..1."""
    mode: str
    """cached | online: asked once about each person, its answer carried through every
    augmentation; or, as a control, asked at each step about the augmented crop itself."""
    views: int
    """cached: about so many crops of each person the teacher is asked: the plain one, and others
    drawn once, for all trials, by scale, rotation and half_body of distill.augment. A stage that
    has the same chooses among them, and draws mirror, colors and patches on top. 1: the answer
    about the plain crop is carried through any augmentation; so is that of predictions in a file,
    which nobody can ask."""
    epochs: int
    """0 uses ``teacher.init`` as it is."""
    batch_size: int
    """People in a training batch."""
    optimizer: OptimizerConfig


@dataclass
class HeatmapTermConfig:
    """The loss between the teacher's heatmaps and the student's."""

    kind: str
    """none | mse | kl: compare heatmaps cell by cell (mse), or as distributions (kl)."""
    weight: float
    """Factor of this term in the loss."""
    tau: float
    """Temperature of kl's softmax."""


@dataclass
class MixConfig:
    """The parts of a mixed structure loss by their weights; 0 leaves a part out."""

    pairwise: float
    """Weight of the distances of every two joints."""
    bone: float
    """Weight of the limbs as vectors."""
    angle: float
    """Weight of the angles between limbs."""
    relation: float
    """Weight of the similarity of the joints' features."""


@dataclass
class StructureTermConfig:
    """The loss between the teacher's body structure and the student's."""

    kind: str
    """none | pairwise | bone | angle | relation | mix: compare the distances of every two joints,
    limbs as vectors, angles between limbs, the similarity of the joints' features, or several."""
    weight: float
    """Of a single kind; mix has weights of its own. A student that starts from ``student.init`` is
    set back by a weight that one from nothing gains by: try 0.01."""
    mix: MixConfig


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
    color: float
    """Spread of brightness and contrast."""
    erase: float
    """Probability of a rectangle of one color, 2 to 15 % of the crop."""
    occlude: float
    """Probability of such a rectangle out of another person's crop instead."""


@dataclass
class DistillConfig:
    """Stage 1, coarse: the teacher's heatmaps and structure teach the student."""

    epochs: int
    """Epochs of stage 1."""
    batch_size: int
    """People in a batch."""
    optimizer: OptimizerConfig
    heatmap: HeatmapTermConfig
    structure: StructureTermConfig
    weights: str
    """fixed | learned: the weights above, or those of uncertainty weighting in their place."""
    schedule: str
    """constant | linear | ramp: how the teacher's share goes over the epochs."""
    normalize: str
    """initial: every term is divided by its mean before training, so that weights compare."""
    diagnose: bool
    """Report what each term's gradient is beside the others'; training stays the same."""
    augment: AugmentConfig


@dataclass
class RefineConfig:
    """Stage 2, fine: IGP-GCN moves the student's joints, level by level."""

    epochs: int
    """0 leaves stage 2 out."""
    batch_size: int
    """People in a batch."""
    optimizer: OptimizerConfig
    student: str
    """frozen | finetuned: whether the student's features learn too; its batch norms keep their
    statistics, its heatmaps get no loss."""
    student_factor: float
    """Share of the rate that a finetuned student takes."""
    start: str
    """student | jitter | the path of a JSON of another method's COCO keypoint results on the
    training images: the poses that the refiner learns to improve. jitter: the truth with noise,
    and what is not labeled from the student. A JSON: matched to people as for
    teacher.name=predictions; people and joints that it lacks start from the student.
    Left and right of poses from either are named anew before they are refined."""
    jitter: float
    """Largest spread of jitter's noise along x and y, over the root of the person's area; most
    joints have far less."""
    candidates: int
    """Places per joint to choose from, 1 to 3: the student's highest peaks, and before them, where
    refine.start is not the student, the given one. 1 takes the first."""
    levels: int
    """1 to 3 levels, at strides 16, 8 and 4 or the finest of these."""
    depth: int
    """Residual graph blocks in each level, 1 to 6."""
    width: int
    """Channels of a node, a multiple of 4."""
    dropout: float
    """Share of node channels that training zeroes."""
    gate: bool
    """Scale each joint's step by a learned confidence."""
    loss: str
    """oks | smooth_l1: how the distance of a joint is measured."""
    progressive: str
    """final | interpolated: each level's target is the final pose, or its share of the way."""
    teacher_weight: float
    """Weight of the distance to the teacher's final pose."""
    truth_weight: float
    """Weight of the distance to the ground truth."""
    perturb: bool
    """Give the student's pose, in training, the errors it makes on people it has not seen; other
    starts stay as they are."""
    augment: AugmentConfig


@dataclass
class ConstraintsConfig:
    """The most that a trial may cost and still win; null = whatever it is."""

    latency_ms: float | None
    """Latency for one crop, ms."""
    parameters: float | None
    """Number of parameters."""


@dataclass
class PlanConfig:
    """What a trial is; ``plan=joint`` and ``plan=staged`` set all of it."""

    kind: str
    """joint | staged: a trial is stage 1, then stage 2; or first students are searched, then
    refiners that start from the best of them, each trial one stage."""
    parents: int
    """staged: how many students refiners may start from."""
    distill_share: float
    """staged: the share of search.trials that are students. Once refiners are searched, further
    trials are refiners."""


@dataclass
class SearchConfig:
    """How many trials, what they are to reach, and which of them are ended early."""

    trials: int
    """Finished trials, controls included, at which the search ends."""
    concurrent: int
    """Trials at once; 0 = as many as the machine has room for."""
    sampler: str
    """tpe | gp | cmaes | nsga2 | qmc | random: what chooses the values to try."""
    startup_trials: int
    """Trials drawn at random before tpe, gp or cmaes models anything; also those that must be
    complete before median or percentile prunes."""
    population: int
    """Trials of a generation of nsga2."""
    objectives: list[str]
    """ap alone, or ap with latency_ms, parameters or both, which are to be low."""
    constraints: ConstraintsConfig
    warm_start: list[str]
    """Folders of older studies of the same data and teacher: their trials are known from the
    start, and count as none of this study's."""
    pruner: str
    """successive_halving | hyperband | median | percentile | none, always by AP."""
    min_epochs: int
    """Epochs before a trial can be pruned."""
    reduction_factor: int
    """successive_halving, hyperband: one of so many trials goes on from rung to rung."""
    percentile: float
    """pruner=percentile: so many of 100 trials go on."""


@dataclass
class ConfirmConfig:
    """After the search: the best trials and the baseline trained again, to see if it was luck."""

    trials: int
    """How many of the best trials, by their objective; 0 leaves it out."""
    seeds: int
    """How often each is trained, from seeds that no trial of the search had."""


@dataclass
class TrialConfig:
    """Where and on what one trial runs."""

    launcher: str
    """auto | inline | train. auto: one CPU worker inline, everything else under Ray Train."""
    num_workers: int
    """Workers that train one trial together."""
    cpus: float
    """CPUs of a worker, a thread each; small crops gain nothing from more than one. 0.5 puts two
    workers on a CPU."""
    gpus: float
    """GPUs of a worker; 0.5 puts two workers on a GPU, which share its memory."""
    max_failures: int
    """How often a trial that broke goes on from its checkpoint before it counts as failed."""
    timeout_s: float
    """A trial that ends no epoch for so long, start and torch.compile included, has failed: its
    processes are ended; 0 = it may take any time."""
    precision: str
    """auto | fp32 | bf16: what networks, the teacher's too, compute in, in training and scoring.
    auto: bf16 on GPUs that have it, else fp32. Weights, losses, decoding and refiner are fp32."""
    channels_last: str
    """auto | true | false: the memory format of networks and what they see. auto: true."""
    compile: str
    """auto | true | false: whether torch.compile speeds up the training of teacher and student.
    auto: on GPUs, in stages long enough to be worth the compiling (study/training/networks.py)."""


@dataclass
class StudyConfig:
    """All settings of one study."""

    name: str
    """The study's folder under ``storage``; auto: named for data, plan and search space."""
    storage: str
    """Folder of all studies and of what they share."""
    seed: int
    """Seed of all random draws of the study."""
    plan: PlanConfig
    search_space: str
    """distill | refine | joint | staged | poses | smoke, or the path of a YAML of your own."""
    display: str
    """auto | live | plain | none."""
    log: list[str]
    """tensorboard, mlflow, both or none: where trials are written besides, by these packages, in
    the study's folder, or where MLFLOW_TRACKING_URI says."""
    plan_only: bool
    """Say what the study would compute, and how long it may take here; compute nothing."""
    data: DataConfig
    teacher: TeacherConfig
    student: ModelConfig
    distill: DistillConfig
    refine: RefineConfig
    search: SearchConfig
    confirm: ConfirmConfig
    trial: TrialConfig


RENAMED = {
    "data.train_pictures": "data.num_train_images",
    "data.val_pictures": "data.num_val_images",
    "distill.augment.colour": "distill.augment.color",
    "refine.augment.colour": "refine.augment.color",
}
"""Settings by their former path: older studies and command lines have those."""
