from typing import Any

def build_info() -> dict[str, Any]: ...
def adam_moments(
    projected: int,
    exp_avg: int,
    exp_avg_sq: int,
    direction: int,
    direction_sq: int,
    projected_sq: int,
    rows: int,
    cols: int,
    channels_are_rows: bool,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    threads: int,
    device: int = -1,
    stream: int = 0,
) -> None: ...
