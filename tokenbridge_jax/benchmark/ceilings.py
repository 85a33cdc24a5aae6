"""The best rates of one device: a large matrix product and a large copy of random numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tokenbridge_jax.benchmark.timing import Timing, time_calls


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The best rates of one device.

    Attributes:
      matmul_size: rows and columns of both factors.
      matmul_dtype: dtype of the factors: bfloat16, or float32 on a CPU.
      matmul: time of one product.
      copy_bytes: bytes read plus bytes written.
      copy: time of one copy.
    """

    matmul_size: int
    matmul_dtype: str
    matmul: Timing
    copy_bytes: int
    copy: Timing

    @property
    def flops_per_second(self) -> float:
        """Rate of the product."""
        return 2 * self.matmul_size**3 / self.matmul.median

    @property
    def bytes_per_second(self) -> float:
        """Rate of the copy: bytes read plus bytes written."""
        return self.copy_bytes / self.copy.median

    def to_json(self) -> dict[str, Any]:
        """The first line of a report."""
        device = jax.devices()[0]
        return {
            "what": "ceilings",
            "device": device.device_kind,
            "platform": device.platform,
            "devices": jax.device_count(),
            "jax": jax.__version__,
            "matmul": {
                "size": self.matmul_size,
                "dtype": self.matmul_dtype,
                "seconds": self.matmul.to_json(),
                "flops_per_second": self.flops_per_second,
            },
            "copy": {
                "bytes": self.copy_bytes,
                "seconds": self.copy.to_json(),
                "bytes_per_second": self.bytes_per_second,
            },
        }


def measure_ceilings(repeats: int) -> Ceilings:
    """Measures the first device of this process: 8192^3 and 8 GiB; a CPU 1024^3 and 128 MiB."""
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    size, dtype = (1024, "float32") if on_cpu else (8192, "bfloat16")
    values = 2**24 if on_cpu else 2**30
    with jax.default_device(device):
        return Ceilings(
            size, dtype, _matmul(size, dtype, repeats), 8 * values, _copy(values, repeats)
        )


def _matmul(size: int, dtype: str, repeats: int) -> Timing:
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="default"))
    return time_calls(lambda: product(a, b), repeats)


def _copy(values: int, repeats: int) -> Timing:
    """Reads and writes every value once, in place: a real copy would need twice the memory."""
    part = jax.random.normal(jax.random.key(0), (2**20,))
    kept = [jax.jit(lambda x: jnp.tile(x, values // len(x)))(part)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call() -> jax.Array:
        kept[0] = add(kept[0])
        return kept[0]

    return time_calls(call, repeats)
