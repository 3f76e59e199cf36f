"""What a vLLM server runs of ours, in the process that holds the model: it takes over weights from files.

`observe-r1 serve` names `WeightReader` to vLLM as its worker extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from observe_r1.rollout.weight_files import check_directory


class WeightReader:
    """Methods that vLLM adds to its worker and `/collective_rpc` calls by name."""

    model_config: Any
    model_runner: Any
    reload_weights: Callable[..., None]

    def observe_r1_state(self) -> dict[str, Any]:
        """What a trainer compares with its own settings before the first rollout."""
        config = self.model_config
        return {
            "model_type": config.hf_config.model_type,
            "logprobs_mode": str(config.logprobs_mode),
            "max_model_len": config.max_model_len,
            "image_size": (config.multimodal_config.mm_processor_kwargs or {}).get("size"),
        }

    def observe_r1_load(self, directory: str) -> None:
        """Takes over every weight of a directory that `WeightFiles` wrote.

        Raises:
            ValueError: The directory is incomplete; the weights in the model are still the ones before.
        """
        files = check_directory(Path(directory))
        self.reload_weights(weights_iterator=_read(files))
        model = self.model_runner.get_model()
        if next(model.parameters()).device.type == "cpu":
            pack_heads(model)


def pack_heads(model: torch.nn.Module) -> None:
    """On a CPU vLLM computes logits with a packed copy of the head, which a reload leaves as it was in a tied head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                yield name, weights.get_tensor(name)
