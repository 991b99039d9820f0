"""A progress bar for work that goes layer by layer, or run by run."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def layers_done(total: int, quiet: bool = False, unit: str = "layers") -> Iterator[Callable[[str, int], None]]:
    """A function to tell what is being done, and how many more layers of it are.

    Nothing is shown before the first word of it: what is refused is told in one line.

    Args:
        total: layers in all.
        quiet: show nothing, as where nobody looks: stderr is no terminal.
        unit: what is counted, in the plural.
    """
    with contextlib.suppress(ImportError):  # whoever needs it says so
        from transformers.utils import logging

        logging.disable_progress_bar()  # of the weights, which are loaded in seconds
    shown = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit}, {{elapsed}} gone"
    bar = None

    def tell(name: str, layers: int) -> None:
        nonlocal bar
        if bar is None:
            from tqdm import tqdm  # comes with transformers, which whoever has something to tell has imported

            bar = tqdm(total=total, bar_format=shown, disable=quiet or None)
        bar.set_description_str(name)
        bar.update(layers)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
