"""A progress bar for work that goes layer by layer."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def layers_done(total: int, quiet: bool = False) -> Iterator[Callable[[str, int], None]]:
    """A function to tell what is being done, and how many more layers of it are; `quiet`: show nothing."""
    from tqdm import tqdm

    shown = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} layers, {elapsed} gone"
    with tqdm(total=total, bar_format=shown, disable=quiet) as bar:

        def tell(name: str, layers: int) -> None:
            bar.set_description(name)
            bar.update(layers)

        yield tell
