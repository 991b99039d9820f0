"""`benchmarks/serving.py` and the modules beside it, which import each other by their names alone."""

import importlib.util
import sys

from processes import ROOT

FOLDER = ROOT / "benchmarks"

sys.path.insert(0, str(FOLDER))
try:
    import chunks
    import latency
    import load
    import needles
    import offline
    import record
    import servers

    # Under a name of its own: the tests have a helper named serving.
    spec = importlib.util.spec_from_file_location("benchmarks_serving", FOLDER / "serving.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
finally:
    sys.path.remove(str(FOLDER))

__all__ = ["chunks", "latency", "load", "main", "needles", "offline", "record", "servers"]
