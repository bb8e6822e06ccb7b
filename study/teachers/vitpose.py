"""ViTPose of the ``transformers`` library as a teacher, loaded from a local folder.

Nothing is downloaded, and no code outside the library runs. Xu et al., ViTPose, NeurIPS 2022.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.build import STRIDE
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.errors import InputError


class VitPose(PoseNetwork):
    """ViTPose: heatmaps of stride 4 with outer cells at the crop's outer pixels.

    Its only feature map is the input of the head's last layer.
    """

    def __init__(self, folder: Path, skeleton: Skeleton, input_size: tuple[int, int]) -> None:
        """Load the network.

        Raises:
            InputError: see ``check_vitpose``, or the folder lacks weights.
        """
        super().__init__()
        config = check_vitpose(folder, skeleton, input_size)
        library = _library()
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        try:
            self.model, loaded = library.VitPoseForPoseEstimation.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # the library has no exception of its own
            raise InputError(f"{folder} must hold ViTPose's safetensors: {error}") from None
        if left_random := sorted(loaded["missing_keys"]):
            raise InputError(
                f"{folder} must hold all weights of its config.json, got none of "
                f"{len(left_random)}, the first are {left_random[:5]}; save the model again by "
                "save_pretrained"
            )
        self.has_experts = config.backbone_config.num_experts > 1

    def forward(self, crops: Tensor) -> PoseFeatures:
        # ViTPose+ has one expert per data set; the first is COCO's.
        experts = {}
        if self.has_experts:
            experts["dataset_index"] = torch.zeros(len(crops), 1, dtype=torch.long).to(
                crops.device
            )
        seen: list[Tensor] = []
        last = self.model.head.conv
        with last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
            heatmaps = self.model(crops, **experts).heatmaps
        return PoseFeatures(heatmaps, (seen[0],))


def check_vitpose(folder: Path, skeleton: Skeleton, input_size: tuple[int, int]) -> Any:
    """Check the ViTPose in the folder against skeleton and input size; return its settings.

    Raises:
        InputError: the folder holds no ViTPose, or one of other joints or another input size.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "teacher.init must be a folder with ViTPose's config.json and safetensors, got "
            f"teacher.init={folder} ({error})"
        ) from None
    # The library would try to download a backbone of another kind.
    backbone = raw.get("backbone_config") or {}
    if raw.get("model_type") != "vitpose" or backbone.get("model_type") != "vitpose_backbone":
        raise InputError(
            "teacher.init must be the folder of a VitPoseForPoseEstimation with its own backbone, "
            f"got {raw.get('model_type')} on {backbone.get('model_type')} in {folder}; change "
            "teacher.init"
        )
    config = _library().VitPoseConfig.from_dict(raw)
    if config.num_labels != skeleton.num_joints:
        raise InputError(
            f"the teacher must have {skeleton.num_joints} joints ({skeleton.name}), got one "
            f"of {config.num_labels} joints in {folder}; change teacher.skeleton or teacher.init"
        )
    sides = tuple(config.backbone_config.image_size)
    stride = config.backbone_config.patch_size[0] // config.scale_factor
    if sides != tuple(input_size) or stride != STRIDE:
        raise InputError(
            f"the ViTPose in {folder} takes crops of {list(sides)} and outputs heatmaps of stride "
            f"{stride}, got teacher crops of {list(input_size)} and stride {STRIDE}; change to "
            f"teacher.input_size=[{sides[0]},{sides[1]}], or use another model"
        )
    return config


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError(
            "teacher.name=vitpose needs the library transformers, which is not installed; "
            "pip install -e '.[vitpose]'"
        ) from None
    return transformers
