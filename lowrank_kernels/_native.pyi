from collections.abc import Sequence
from typing import Any

Addresses = Sequence[int]
# Addresses, a code (float32 0, bfloat16 1, float16 2), elements from row to row.
Matrices = tuple[Addresses, int, int]
# Moments come as float32 (format 0), bfloat16 (1) or codes with scales (2).

def build_info() -> dict[str, Any]: ...
def adam_moments(
    *,
    product: Matrices,
    projected: Addresses,
    exp_avg: Addresses,
    exp_avg_sq: Addresses,
    direction: Addresses,
    direction_sq: Addresses | None,
    projected_sq: Addresses | None,
    rows: int,
    cols: int,
    channels_are_rows: bool,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    format: int = 0,
    exp_avg_scale: Addresses | None = None,
    exp_avg_sq_scale: Addresses | None = None,
    moment_salts: Sequence[int] | None = None,
    step: int = 0,
    threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
def residual_sums(
    *,
    matrix: Matrices,
    residual_sq: Addresses,
    projected_sq: Addresses | None,
    rows: int,
    cols: int,
    channels_are_rows: bool,
    kappa: float,
    threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
def channel_scale(
    *,
    direction_sq: Addresses,
    projected_sq: Addresses,
    residual_sq: Addresses,
    limiter_norm: Addresses,
    factor: Addresses,
    channels: int,
    threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
def combine(
    *,
    direction: Addresses,
    projected: Addresses,
    factor: Addresses | None,
    combined: Matrices,
    rows: int,
    cols: int,
    channels_are_rows: bool,
    scale: float,
    rho_kappa: float,
    threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
def update(
    *,
    param: Matrices,
    product: Matrices,
    grad: Matrices | None,
    factor: Addresses | None,
    rows: int,
    cols: int,
    channels_are_rows: bool,
    step_size: float,
    decay: float,
    rho: float,
    salts: Sequence[int] | None,
    step: int,
    first_row: int,
    first_col: int,
    threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
def adamw(
    *,
    param: Matrices,
    grad: Matrices,
    exp_avg: Addresses,
    exp_avg_sq: Addresses,
    elements: int,
    step_size: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    format: int = 0,
    exp_avg_scale: Addresses | None = None,
    exp_avg_sq_scale: Addresses | None = None,
    moment_salts: Sequence[int] | None = None,
    step: int = 0,
    threads: int,
) -> None: ...

class TensorReader:
    def __init__(self, exchange_api: object, others: Any) -> None: ...
    def layouts(self, tensors: list[Any]) -> object: ...
    def places(self, tensors: list[Any]) -> object: ...
    def counts(self, counters: list[Any]) -> list[int]: ...
    def add_one(self, counters: list[Any]) -> None: ...
