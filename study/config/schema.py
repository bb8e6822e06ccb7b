"""The schema of a study's settings: types and meanings.

Every field is one override on the command line (``distill.optimizer.lr=3e-4``). The values are in
``study/config/*.yaml``, so that no default is written twice; ``config/checks.py`` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RANDOM = "random"
"""Value of ``init`` for a network without trained weights."""
SHARED_FOLDER = "cache"
"""Folder under ``storage`` that all studies share; no study may have this name."""
MIX = ("pairwise", "bone", "angle", "relation")
"""The parts of a mixed structure loss."""
MOBILE_NET, MOVENET = "mobile_net", "movenet"
MOVENET_SIZES = ("lightning", "thunder")
SIZES = {
    MOBILE_NET: ("tiny", "small", "medium", "large", "teacher", *MOVENET_SIZES),
    "hrnet": ("w18_small", "w18", "w32", "w48"),
    "simple_baseline": ("r18", "r50", "r101", "r152"),
}
"""Sizes of each architecture, for teacher and student."""
STUDENT, JITTER = "student", "jitter"
"""Values of ``refine.start`` other than a path."""
JOINT, STAGED = "joint", "staged"
"""Values of ``plan.kind``."""
CACHED, ONLINE = "cached", "online"
"""Values of ``teacher.mode``."""
VITPOSE, ONNX, PREDICTIONS = "vitpose", "onnx", "predictions"
"""Values of ``teacher.name`` other than our own architectures."""
FROM_DATA = "from_data"
"""Value of ``data.skeleton`` for the joints that the annotation file names."""
TENSORBOARD, MLFLOW = "tensorboard", "mlflow"
"""Trackers that ``log`` may name."""
Kind = Literal["coco", "crowdpose"]
"""The rules of an evaluation."""
AP = "ap"
LATENCY, PARAMETERS = COSTS = ("latency_ms", "parameters")
"""Costs of a trial's estimator, to be minimized; measured before training."""
CONSTRAINTS = "search.constraints."


@dataclass
class SplitConfig:
    """Annotations and images of a split."""

    annotations: str
    """COCO-format keypoint JSON, relative to ``data.root``."""
    images: str
    """Folder of the images, relative to ``data.root``."""


@dataclass
class ValConfig(SplitConfig):
    """The official validation split, on which only the finalists are scored."""

    detections: str | None
    """COCO detections JSON, relative to ``data.root``, whose boxes are used for people; null uses
    the boxes of the annotations."""
    detection_threshold: float
    """Detected boxes with a lower score are ignored."""
    oks_nms: float
    """OKS, 0 to 1, above which the lower-scoring of two poses in an image is dropped; 1 drops
    none."""


@dataclass
class DataConfig:
    """The images and people of a study."""

    kind: str
    """drawn | coco | crowdpose: decides the rules of evaluation and how people are selected."""
    root: str
    """Folder of the data."""
    train: SplitConfig
    val: ValConfig
    skeleton: str
    """coco (17 joints) | crowdpose (14 joints) | from_data | path of a YAML file. from_data takes
    joints and limbs from the category in ``data.train.annotations``. A file maps joints, edges,
    flip_pairs, oks_sigmas and upper_body to lists; the README has an example."""
    category: str | None
    """Name of the people's category in the annotation files; null is the one with joints."""
    input_size: tuple[int, int]
    """(height, width) of the person crop that networks see, px; both divisible by 32."""
    search_fraction: float
    """Share of the training images held out as the search slice, on which trials are scored."""
    max_bad_fraction: float
    """Largest share of people with faults, 0 to 1; faulty people are left out, and the study stops
    above this share."""
    max_people: int
    """Largest number of training people; images are dropped at random to meet it. 0 uses all."""
    num_train_images: int
    """Training images to draw; only with data=drawn."""
    num_val_images: int
    """Validation images to draw; only with data=drawn."""
    seed: int
    """Seed of the search slice, of data.max_people and, with data=drawn, of the drawn images."""
    crops: str
    """raw | jpeg | auto: format of stored crops. auto stores raw up to 4 GB per study, otherwise
    jpeg."""
    store: str | None
    """Folder or object store (s3://bucket/prefix, gs://bucket/prefix) of the crops; each node
    downloads them once from an object store. null uses the cache under ``storage``."""


@dataclass
class ModelConfig:
    """A network, the teacher or the student, and how its heatmaps are decoded."""

    name: str
    """mobile_net | hrnet | simple_baseline; the teacher also vitpose | onnx | predictions."""
    size: str
    """Size of the architecture. mobile_net: tiny | small | medium | large | teacher, or lightning
    | thunder (MoveNet). hrnet, by width: w18_small | w18 | w32 | w48. simple_baseline, by depth of
    its ResNet: r18 | r50 | r101 | r152."""
    codec: str
    """msra | dark | udp | simcc: encoding and decoding of heatmaps. The teacher also movenet, the
    decoding of an unchanged MoveNet."""
    sigma: float
    """Standard deviation of the target Gaussian, heatmap cells."""
    init: str
    """random, or the path of weights to start from: safetensors, a file of torch.save, or the
    .json of a MoveNet for TF.js."""
    flip_test: bool
    """Average predictions over each crop and its mirror image, except in training."""


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay of the rate to 0."""

    lr: float
    """Learning rate after the warm-up."""
    weight_decay: float
    """Weight decay of AdamW."""
    warmup_fraction: float
    """Share of all steps in the warm-up, 0 to 0.9."""
    pretrained_factor: float
    """Factor of the rate, 0 to 1, for layers that start from trained weights."""


@dataclass
class TeacherConfig(ModelConfig):
    """The teacher, trained or loaded once for all trials: one of our networks or another method.

    ``name`` may also be vitpose (``init`` is a folder with config.json and safetensors), onnx
    (``init`` is a file) or predictions (``init`` is a JSON of COCO keypoint results on the
    training images). These have no ``size``; vitpose and predictions have no ``codec`` either.
    """

    skeleton: str | None
    """Skeleton that the teacher predicts: coco | crowdpose | path of a YAML file; null is the
    data's. Joints are paired by name. Those that the data lack are dropped; those that the teacher
    lacks have no target and count as missed in its AP."""
    input_size: tuple[int, int] | None
    """(height, width) of the crop that the teacher sees, px, both divisible by 32; null is the
    data's."""
    pixels: str
    """imagenet | unit: input of an onnx file, RGB normalized as for ImageNet, or in 0..1."""
    mode: str
    """cached | online: targets are predicted once per person and transformed with each
    augmentation, or predicted at each training step for the augmented crop (a control)."""
    views: int
    """mode=cached: number of crops per person for which targets are stored, 1 plain and the rest
    random in scale, rotation and half_body of distill.augment. Stages with the same settings
    choose among these crops and draw only mirror, colors and patches. 1 stores the plain crop
    alone. No effect with teacher.name=predictions."""
    seed: int | None
    """Seed of the teacher's training and of its views; null is ``seed``. Studies of other seeds
    share the teacher if they set it."""
    epochs: int
    """Epochs of the teacher's training; 0 uses ``teacher.init`` unchanged."""
    batch_size: int
    """People per training step, over all workers."""
    optimizer: OptimizerConfig


@dataclass
class HeatmapTermConfig:
    """The loss between the teacher's and the student's heatmaps."""

    kind: str
    """none | mse | kl."""
    weight: float
    """Weight of the loss."""
    tau: float
    """kind=kl: temperature of the softmax, as a share of each map's peak."""


@dataclass
class MixConfig:
    """Weights of the parts of a mixed structure loss; 0 leaves a part out."""

    pairwise: float
    """Weight of the distances between joints."""
    bone: float
    """Weight of the limbs' vectors."""
    angle: float
    """Weight of the angles between limbs."""
    relation: float
    """Weight of the cosines between the joints' features."""


@dataclass
class StructureTermConfig:
    """The loss between the teacher's and the student's body structure."""

    kind: str
    """none | pairwise | bone | angle | relation | mix."""
    weight: float
    """Weight of a single kind; mix has weights of its own. With trained weights in student.init
    try 0.01: more lowers the AP of such a student."""
    mix: MixConfig


@dataclass
class AugmentConfig:
    """Random changes of each person's crop, drawn in every epoch, as in the official HRNet."""

    scale: float
    """Standard deviation of the scale factor around 1, cut at one standard deviation."""
    rotation: float
    """Standard deviation of the rotation, degrees, cut at two; 60 % of the crops are rotated."""
    flip: float
    """Probability of a mirror image, 0 to 1."""
    half_body: float
    """Probability of a crop around the upper or lower body alone, 0 to 1."""
    color: float
    """Largest change of brightness and contrast, as a share."""
    erase: float
    """Probability of a rectangle of one color, 2 to 15 % of the crop, 0 to 1."""
    occlude: float
    """Probability of such a rectangle cut from another person's crop, 0 to 1."""


@dataclass
class DistillConfig:
    """Stage 1, coarse: the student learns from labels and from the teacher."""

    epochs: int
    """Epochs of stage 1."""
    batch_size: int
    """People per training step, over all workers."""
    optimizer: OptimizerConfig
    heatmap: HeatmapTermConfig
    structure: StructureTermConfig
    weights: str
    """fixed | learned: weights as set above, or learned by uncertainty weighting."""
    schedule: str
    """constant | linear | ramp: weight of the teacher's terms over the epochs: constant, falling
    to 0, or rising from 0."""
    normalize: str
    """initial | none: initial divides each term by its mean before training, so that weights
    compare."""
    diagnose: bool
    """Report each term's share of the gradient; training is unchanged."""
    augment: AugmentConfig


@dataclass
class RefineConfig:
    """Stage 2, fine: IGP-GCN moves the student's joints, level by level."""

    epochs: int
    """Epochs of stage 2; 0 skips it."""
    batch_size: int
    """People per training step, over all workers."""
    optimizer: OptimizerConfig
    student: str
    """frozen | finetuned: whether the student's features are trained too. Batch norms keep their
    statistics, and heatmaps have no loss."""
    student_factor: float
    """student=finetuned: factor of the student's rate, 0 to 1."""
    start: str
    """student | jitter | path: poses that the refiner learns to improve. jitter: the labels with
    noise. path: a .json of another method's COCO keypoint results on the training images. Joints
    without a label or a result start from the student. With jitter or a path, left-right swaps are
    resolved first."""
    jitter: float
    """start=jitter: largest standard deviation of the noise along x and y, as a share of the root
    of the person's area; most joints get far less."""
    candidates: int
    """Places per joint to choose from, 1 to 3: the student's highest peaks, after the pose of
    refine.start unless that is student. 1 takes the first place."""
    levels: int
    """Levels of the refiner, 1 to 3."""
    depth: int
    """Residual graph blocks per level, 1 to 6."""
    width: int
    """Channels per joint, a multiple of 4."""
    dropout: float
    """Dropout in the graph layers, 0 to 0.9."""
    gate: bool
    """Scale each joint's step by a learned confidence."""
    loss: str
    """oks | smooth_l1."""
    progressive: str
    """final | interpolated: target of each level, the final pose or one on the way to it."""
    teacher_weight: float
    """Weight of the loss to the teacher's pose."""
    truth_weight: float
    """Weight of the loss to the labels."""
    perturb: bool
    """Add the student's errors on unseen people to its poses in training; only with
    start=student."""
    augment: AugmentConfig


@dataclass
class ConstraintsConfig:
    """Largest costs with which a trial can win; null sets no limit."""

    latency_ms: float | None
    """Largest latency for one crop, ms."""
    parameters: float | None
    """Largest number of parameters."""


@dataclass
class PlanConfig:
    """The stages of a trial; ``plan=joint`` and ``plan=staged`` choose them."""

    kind: str
    """joint | staged: each trial runs stage 1, then stage 2; or students are searched first, then
    refiners that start from the best students, one stage per trial."""
    parents: int
    """plan=staged: number of students that refiners may start from."""
    distill_share: float
    """plan=staged: share of search.trials that are students, 0.01 to 0.99. Trials added after the
    hand-over are refiners."""


@dataclass
class SearchConfig:
    """The trials, their objectives, and which of them are pruned."""

    trials: int
    """Finished trials, controls included, at which the search ends."""
    concurrent: int
    """Trials at the same time; 0 uses all CPUs or GPUs."""
    sampler: str
    """tpe | gp | cmaes | nsga2 | qmc | random: chooses the values of each trial."""
    startup_trials: int
    """Random trials before tpe, gp or cmaes uses its model; also complete trials before median or
    percentile prunes."""
    population: int
    """sampler=nsga2: trials per generation."""
    objectives: list[str]
    """ap, optionally followed by latency_ms, parameters or both, which are minimized."""
    constraints: ConstraintsConfig
    warm_start: list[str]
    """Folders of older studies of the same data and teacher. The sampler learns from their trials,
    which don't count for search.trials."""
    pruner: str
    """successive_halving | hyperband | median | percentile | none: ends trials early by their
    AP."""
    min_epochs: int
    """Epochs before a trial can be pruned."""
    reduction_factor: int
    """pruner=successive_halving or hyperband: one of this many trials passes each rung."""
    percentile: float
    """pruner=percentile: percentage of trials that continue, 0 to 100."""


@dataclass
class ConfirmConfig:
    """After the search, the best trials and the baseline are trained again from new seeds."""

    trials: int
    """Number of best trials to confirm; 0 skips this step."""
    seeds: int
    """Runs of each, from seeds that no trial of the search had; at least 2."""


@dataclass
class TrialConfig:
    """The resources and the arithmetic of one trial."""

    launcher: str
    """auto | inline | train: inline runs one worker in the trial's process, train runs workers
    under Ray Train. auto is inline for one worker without a GPU, otherwise train."""
    num_workers: int
    """Workers of a trial."""
    cpus: float
    """CPUs per worker, one thread each; small crops gain nothing from more than one. 0.5 lets two
    workers share a CPU."""
    gpus: float
    """GPUs per worker; 0.5 lets two workers share a GPU and its memory."""
    max_failures: int
    """Times that a crashed trial resumes from its checkpoint before it counts as failed."""
    timeout_s: float
    """Seconds without a finished epoch, start and compilation included, after which a trial fails
    and its processes are ended; 0 sets no limit."""
    precision: str
    """auto | fp32 | bf16: precision of all networks in training and evaluation. auto is bf16 on
    GPUs that support it, otherwise fp32. Weights, losses, decoding and refiner are always fp32."""
    channels_last: str
    """auto | true | false: memory format of networks and crops; auto is true."""
    compile: str
    """auto | true | false: compile teacher and student by torch.compile for training. auto
    compiles on GPUs in stages of 20,000 steps or more."""


@dataclass
class StudyConfig:
    """All settings of one study."""

    name: str
    """Folder of the study under ``storage``; auto builds it from data, plan and search space."""
    storage: str
    """Folder of all studies and of their shared cache."""
    seed: int
    """Seed of everything random in teacher, search and trials."""
    plan: PlanConfig
    search_space: str
    """distill | refine | joint | staged | poses | smoke, or the path of a YAML file."""
    display: str
    """auto | live | plain | none: live tables, plain lines, or no output; auto is live in a
    terminal, otherwise plain."""
    log: list[str]
    """Trackers to write trials to: tensorboard, mlflow, both or none. Their files are in the
    study's folder; MLFLOW_TRACKING_URI redirects mlflow."""
    plan_only: bool
    """Report what the study would compute and how long it may take here, without computing it."""
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
"""Settings by their former path, which older studies and command lines use."""
