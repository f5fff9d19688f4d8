"""What is predicted from what: the protocols in which N-body results are reported.

NumPy only: importing this file is quick.
"""

import numpy as np

LAYOUT_VERSION = 1  # of the arrays in an N-body cache: raise it with every change of what `dataloader.nbody` writes

PROTOCOLS: dict[str, dict[str, int | str]] = {
    # delta_frames: frames from start to target, 0.1 time units each;
    # eval_start_frames: where validation and test simulations start, see `eval_start_frames`
    "readme": {"delta_frames": 5, "eval_start_frames": "spread"},
    "paper": {"delta_frames": 10, "eval_start_frames": "first"},
    # Satorras et al. 2021 (EGNN, arXiv 2102.09844), data set nbody_small of their code: from frame 30 to frame 40
    "egnn": {"delta_frames": 10, "eval_start_frames": 30},
}


def cache_settings(protocol: str) -> dict:
    """What the cache of a protocol depends on besides its simulations."""
    return {"layout": LAYOUT_VERSION} | PROTOCOLS[protocol]


def position_std(protocol: str, n_balls: int) -> float:
    """Standard deviation of each coordinate at the start of a simulation.

    In `egnn` it is (n/5)^(1/3), so that n particles are as dense as five; elsewhere it is 1.
    """
    return (n_balls / 5) ** (1 / 3) if protocol == "egnn" else 1.0


def eval_start_frames(rule: str | int, num_simulations: int, num_start_frames: int) -> np.ndarray:
    """The start frame of every validation or test simulation, int64 (S,).

    Args:
        rule: "first": 0; "spread": floor(T / S · i) for simulation i, as the authors do; a number: this frame.
        num_simulations: S.
        num_start_frames: T, frames that leave room for the target.

    Raises:
        ValueError: no such rule, or the frame leaves no room for the target.
    """
    if rule == "first":
        return np.zeros(num_simulations, dtype=np.int64)
    if rule == "spread":
        return np.floor(num_start_frames / num_simulations * np.arange(num_simulations)).astype(np.int64)
    if isinstance(rule, int):
        if rule >= num_start_frames:
            raise ValueError(f"points: expected room for the target after frame {rule}, got {num_start_frames} frames")
        return np.full(num_simulations, rule, dtype=np.int64)
    raise ValueError(f"expected the rule first, spread or a frame, got {rule!r}")
