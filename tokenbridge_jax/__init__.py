"""TokenBridge in JAX: images as post-training-quantized latents, generated channel by channel."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenbridge_jax.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `tokenbridge` answers at once, and so does an import of one module.
    if name == "Pipeline":
        from tokenbridge_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
