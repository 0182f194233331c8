"""GPUs that `--dry-run` can estimate for, by what their makers say of them. It bears on no result.

Peaks are those of dense bfloat16 products and of memory traffic (NVIDIA's data sheets of the SXM modules). The price of an hour is no
quotation: what clouds asked in 2025, to be replaced by your own.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Gpu(BaseModel):
    """A GPU, and what is assumed of a run on it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(description="what to call it")
    peak_flops: float = Field(gt=0, description="FLOPs a second of dense bfloat16 products")
    peak_bytes: float = Field(gt=0, description="bytes a second from its memory")
    memory: float = Field(gt=0, description="GiB")
    dollars_per_hour: float = Field(ge=0, description="of one GPU")
    utilisation: float = Field(default=0.4, gt=0, le=1, description="share of either peak that is assumed to be reached")
    longest_prompt: int = Field(default=512, ge=1, description="tokens that are assumed, as no training data are loaded")

    def seconds(self, flops: float, traffic: float = 0.0) -> float:
        """What work of so many FLOPs takes that reads so many bytes: whichever of the two takes longer."""
        return max(flops / self.peak_flops, traffic / self.peak_bytes) / self.utilisation


GPUS = {
    "a100": Gpu(name="A100 80GB", peak_flops=3.12e14, peak_bytes=2.0e12, memory=80, dollars_per_hour=2.0),
    "h100": Gpu(name="H100 80GB", peak_flops=9.89e14, peak_bytes=3.35e12, memory=80, dollars_per_hour=3.0),
    "h200": Gpu(name="H200 141GB", peak_flops=9.89e14, peak_bytes=4.8e12, memory=141, dollars_per_hour=4.0),
}
