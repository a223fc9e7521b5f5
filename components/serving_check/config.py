"""What is asked of a model before it may be served."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServingCheckConfig:
    """Limits of the check.

    Attributes:
        timeout_s: seconds that loading, and each call, may take.
        tolerance: largest difference of an entry of an embedding from the trainer's own, and between batches; a
            float32 network of any depth here keeps 1e-5. With train.precision=bfloat16 it is at least 2 ** -6.
        max_latency_ms: the 95th percentile of one image alone must stay below it, by any signature, on the machine
            that checks; 0 for no limit.
    """

    timeout_s: float = 120.0
    tolerance: float = 1e-5
    max_latency_ms: float = 0.0
