"""Record how much neighbouring query blocks of a real model share: writes src/openvsa/bench/overlap.json.

python scripts/record_overlap.py        # runs the bundled model on the CPU, about a minute

The bundled model makes a clip with sparse attention. Of every self-attention call, the share of a query block's key
blocks that the next query block reads too is averaged per head; the file keeps the mean over steps for each layer and
head. `openvsa bench` makes its "model" plans so that they share as much.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch

import openvsa
from openvsa.bench.plans import shared_with_next
from openvsa.integrations.report import AttentionEvent
from openvsa.models import load_bundled

FILE = Path(__file__).parents[1] / "src" / "openvsa" / "bench" / "overlap.json"
DENSITY, STEPS, SCENE, SEED = 1 / 8, 6, "squirrels", 0


def main() -> None:
    pipe = load_bundled()
    pipe.set_progress_bar_config(disable=True)
    shares: dict[int, list[torch.Tensor]] = defaultdict(list)
    seen = {}

    def record(event: AttentionEvent) -> None:
        assert event.plan is not None
        shares[event.layer].append(shared_with_next(event.plan)[0])
        seen.update(grid=event.layout.grid, tile=event.layout.tile, blocks=event.layout.num_blocks)

    with openvsa.sparsify(pipe, density=DENSITY) as handle:
        handle.on_attention(record)
        pipe(scene=SCENE, seed=SEED, num_inference_steps=STEPS)
    layers = [torch.stack(calls).mean(0) for _, calls in sorted(shares.items())]
    found = {
        "what": "mean share of a query block's key blocks that the next query block reads too, [layer][head]",
        "model": f"the bundled model of openvsa {openvsa.__version__}",
        "command": "python scripts/record_overlap.py",
        "scene": SCENE,
        "seed": SEED,
        "steps": STEPS,
        "density": DENSITY,
        **seen,
        "mean": round(float(torch.stack(layers).mean()), 4),
        "shared_with_next": [[round(float(share), 4) for share in layer] for layer in layers],
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"mean {found['mean']}, wrote {FILE}")


if __name__ == "__main__":
    main()
