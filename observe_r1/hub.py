"""Whether a model of the Hugging Face hub can be had, said at once: the hub's own client tries for minutes."""

from __future__ import annotations

from functools import cache

SECONDS = 15.0  # for the hub to answer


@cache
def check_on_hub(name: str) -> None:
    """Asks the hub for a model, unless it is in the cache.

    Raises:
        ValueError: There is no such model, or it cannot be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    remedy = (
        "Give a directory with config.json and safetensors (`hf download NAME --local-dir DIR` makes one where there "
        "is network), or a name such as Qwen/Qwen2.5-VL-3B-Instruct."
    )
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise ValueError(f"policy.pretrained: {name!r} is not in the cache, and HF_HUB_OFFLINE is set. {remedy}")
        HfApi().model_info(name, timeout=SECONDS)
    except GatedRepoError as error:
        raise ValueError(
            f"policy.pretrained: {name!r} asks for an agreement: accept it on the model's page, then `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"policy.pretrained: {name!r} is neither a directory here nor a model of the hub that you may see. "
            f"{remedy} For a private model: `hf auth login`."
        ) from error
    except OSError as error:  # what answers, but not well, may do so to the client's own attempts
        if getattr(error, "response", None) is None:
            raise ValueError(_unreachable(name, error, remedy)) from error
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(_unreachable(name, error, remedy)) from error


def _unreachable(name: str, error: Exception, remedy: str) -> str:
    return (
        f"policy.pretrained: {name!r} is no directory here, and the hub cannot be reached ({type(error).__name__}: "
        f"{error}). {remedy}"
    )
