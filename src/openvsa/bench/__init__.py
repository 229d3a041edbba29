"""The benchmark behind `openvsa bench`: named cases, a correctness gate, interleaved timing, results as data."""
