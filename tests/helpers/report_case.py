"""A prompt of a small model that is worth a page."""

TOKENS = 700
"""No whole number of segments, nor of tiles."""

GIVEN = {
    "min_seq_len": 256, "segment_len": 128, "tile_size": 32, "key_block": 16, "stop_interval": 1, "dense_tail": 20,
    "threshold": 0.02,
    "layers": [{"layers": 1, "threshold": "dense"}, {"layers": 2, "threshold": 0.05}],
}  # fmt: skip
"""What lies over the default config of `calibration_case`'s model: layer 1 is dense, the two others are not alike."""
