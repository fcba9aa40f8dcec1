"""The training curves of a run, in one image."""

from pathlib import Path

CURVES_FILE = "training_curves.png"
TITLES = {
    "loss": "loss",
    "ce": "denoising loss (nats per token)",
    "distill": "distillation term",
    "lambda": "λ(s)",
    "eval_loss": "held-out loss",
}


def plot_curves(log_history: list[dict], path: str | Path) -> bool:
    """Draws every quantity that was logged at two steps or more, and returns whether there was any.

    Args:
        log_history (`list[dict]`): of the `TrainerState`: `step` and the logged quantities.
        path (`str` or `Path`): the image to write.
    """
    curves = {
        title: [(entry["step"], entry[name]) for entry in log_history if name in entry]
        for name, title in TITLES.items()
    }
    curves = {title: points for title, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    from matplotlib.figure import Figure  # pyplot is not thread-safe

    figure = Figure(figsize=(3.6 * len(curves), 3.0), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, points) in zip(axes, curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True))
        axis.set(xlabel="optimizer step", title=title)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return True
