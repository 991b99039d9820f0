"""Where a picture is written to: what is wrong with it is told before anything is measured."""

import importlib.util
from pathlib import Path


def problem(path: Path) -> str | None:
    """Why no picture can be written there, in a sentence for `argparse`, or None. Folders that are missing are made."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install '.[bench]'"
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        return f"--plot {path}: pictures are files that end in {', '.join(f'.{kind}' for kind in kinds)}"
    if path.is_dir():
        return f"--plot {path} is a folder, not a file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--plot {path}: its folder cannot be made, {error.strerror}"
    return None
