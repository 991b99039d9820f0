"""A page that shows what S2O does: to one prompt of a model, and in a directory of results.

    capture.py   the model on the prompt, each layer with S2O -> densities, errors, one head's rows and stops
    maps.py      those rows as two pictures: keys by position, and in the order in which S2O visits them
    results.py   tables of benchmarks/results -> rows with the types that charts need
    prompt.py    the prompt's part of the page
    bench.py     the results' part
    page.py      both in one document, written whole or not at all

    chart.py, axes.py    lines and points, as SVG
    png.py               pictures of shades
    markup.py, style.py  elements and text, colours in light and in dark

The page is one file. It has no script and asks for nothing: a policy in its head forbids both.
"""
