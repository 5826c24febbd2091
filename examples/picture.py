"""Draw the picture in README.md: held-out digits, and what the built-in model saw in them.

python examples/picture.py docs/images/digits.png
"""

import sys

import numpy as np
from PIL import Image

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.render.frames import picture

COLUMNS, ENLARGED, GAP = 6, 160, 8


def main(path: str) -> None:
    """Writes rows of input, Integrated Gradients (signed) and SmoothGrad (heat)."""
    model, x = zoo.digits_cnn(), zoo.held_out().images[:COLUMNS]
    line = sf.explain(model, x, target="predicted", method=sf.IntegratedGradients(128))
    noise = sf.explain(model, x, target="predicted", method=sf.SmoothGrad(512, noise_level=0.05))
    rows = (picture(x), line.overlay(x), noise.overlay(x, "heat"))
    pitch = ENLARGED + GAP
    sheet = Image.new("RGB", (COLUMNS * pitch - GAP, len(rows) * pitch - GAP), "white")
    for down, frames in enumerate(rows):
        for across, frame in enumerate(frames):
            tile = Image.fromarray(np.asarray(frame)).resize((ENLARGED, ENLARGED), Image.NEAREST)
            sheet.paste(tile, (across * pitch, down * pitch))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
