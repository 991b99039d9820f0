"""The maps of a head as a picture in a file, for a text: beside each other, in the page's light colours."""

from pathlib import Path

from .maps import LEAST, MOST, Maps
from .pictures import stop_steps
from .style import DRAWN_LINE, LIGHT


def draw(maps: Maps, title: str, out: Path) -> None:
    """Both maps as a PNG, with the stop line over the second one; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap, LogNorm

    colours = ListedColormap([tuple(part / 255 for part in shade) for shade in LIGHT])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharey=True)
    for axes, shares in ((left, maps.before), (right, maps.after)):
        image = axes.imshow(
            shares.clamp(LEAST, MOST).numpy(), cmap=colours, norm=LogNorm(LEAST, MOST), interpolation="nearest",
            aspect="auto", extent=(0, maps.extent, maps.num_tokens, 0),
        )  # fmt: skip
        axes.tick_params(labelsize=8)
    left.set_title("Keys by position", fontsize=9, loc="left")
    left.set_xlabel("key's position", fontsize=8)
    left.set_ylabel("query's position", fontsize=8)
    right.set_title("Keys as they are visited; where each tile stops", fontsize=9, loc="left")
    right.set_xlabel("own segment, then the history by importance", fontsize=8)
    scale = maps.num_tokens / len(maps.after)
    x, y = [], []
    for keys, first, end in stop_steps(maps):
        x += [keys, keys]
        y += [first * scale, end * scale]
    right.axvline(maps.segment_len, color="0.5", linewidth=0.8, linestyle="--")
    right.plot(x, y, color=DRAWN_LINE, linewidth=1.4)
    bar = figure.colorbar(image, ax=[left, right], shrink=0.8, pad=0.01)
    bar.set_label("share of the query's attention", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=120, format="png")
    plt.close(figure)
