"""How each kernel is cut into programs: chosen beforehand and checked in, never searched at run
time. `python -m benchmarks.kernels --tune` times the candidates on a GPU, against a copy.
"""

import functools
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Configuration:
    """A program: tiles of `elements`, `tiles` of them one after the other, by `warps`; of a kernel
    that folds rows, the loads of `ahead` rows are in flight together.
    """

    elements: int
    warps: int = 4
    ahead: int = 1
    tiles: int = 1

    def __post_init__(self):
        numbers = (self.elements, self.warps, self.ahead, self.tiles)
        if any(number < 1 or number & (number - 1) for number in numbers):
            raise ValueError(f"a configuration takes powers of two: got {self}")


@dataclass(frozen=True)
class Choice:
    """A kernel's configurations by the bytes of an element, and why.

    `targets` has those of targets that need others, by the beginning of the target's name; `free`
    names what the launcher reads of a configuration; `timed` the GPU on which the choice was
    timed, empty where what the compilers say is all that is known.
    """

    reason: str
    widths: dict[int, Configuration]
    targets: dict[str, dict[int, Configuration]] = field(default_factory=dict)
    free: tuple[str, ...] = ("elements", "warps")
    timed: str = ""

    def at(self, width, target=""):
        """The configuration for elements of `width` bytes on `target`, "sm_90" or "gfx942"."""
        for beginning, widths in self.targets.items():
            if target.startswith(beginning) and width in widths:
                return widths[width]
        return self.widths[width]


def accesses(count, **others):
    """Tiles of which each of 128 threads takes `count` accesses of 16 bytes, for each width."""
    return {width: Configuration(128 * 16 * count // width, **others) for width in (2, 4, 8)}


def copies(count, **others):
    """The same of kernels that copy elements, and so take bytes, too."""
    return accesses(count, **others) | {1: Configuration(128 * 16 * count, **others)}


def same(elements, **others):
    """One configuration for each width."""
    return dict.fromkeys((2, 4, 8), Configuration(elements, **others))


# gfx9 is AMD's CDNA: its warps have 64 threads, so that a tile of the same accesses is twice as
# large. On NVIDIA four warps are one for each scheduler of a multiprocessor.
TABLE = {
    "accumulate.accumulate": Choice(
        "one 16-byte access a thread and row, four rows in flight",
        accesses(1, ahead=4), {"gfx9": accesses(2, ahead=4)}, ("elements", "warps", "ahead"),
    ),
    "accumulate.moments": Choice(
        "as accumulate; mean, spread and four rows take twice its registers already",
        accesses(1, ahead=4), {"gfx9": accesses(2, ahead=4)}, ("elements", "warps", "ahead"),
    ),
    "accumulate.random_lines": Choice(
        "one 16-byte access a thread: gradient, line, draw and total are in registers at once",
        accesses(1), {"gfx9": accesses(2)},
    ),
    "cam.resize": Choice(
        "four outputs a thread, whose neighbours in the small map stay in registers", same(512)
    ),
    "cam.weigh": Choice(
        "one position a thread, as maps of a layer are small; four channels in flight, and few"
        " enough a program that many channels occupy a GPU",
        same(128, ahead=4, tiles=16), free=("elements", "warps", "ahead", "tiles"),
    ),
    "finish.finish": Choice(
        "two 16-byte accesses a thread: a program writes one sum, so larger tiles write fewer",
        accesses(2),
    ),
    "masks.forward": Choice(
        "eight elements a thread, as many as a byte of the mask has bits",
        same(1024), {"gfx9": {2: Configuration(2048)}},
    ),
    "masks.backward": Choice(
        "eight elements a thread, as many as a byte of the mask has bits",
        same(1024), {"gfx9": {2: Configuration(2048)}},
    ),
    "masks.pack": Choice(
        "four accesses of eight flags a thread: a byte of the mask each; eight numbers",
        same(1024) | {1: Configuration(4096)}, {"gfx9": {2: Configuration(2048)}},
    ),
    "norms.forward": Choice(
        "one program a row, as rows of transformers have some hundreds of numbers: sums need no"
        " second pass", same(1024), free=("warps",),
    ),
    "norms.backward": Choice(
        "one program a row, as forward", same(1024), free=("warps",),
    ),
    "overlay.count": Choice(
        "a program adds its histogram once for four tiles: fewer atomics",
        accesses(2, tiles=4), free=("elements", "warps", "tiles"),
    ),
    "overlay.narrow": Choice(
        "one program a row: a prefix sum over 256 counters", same(256), free=("warps",)
    ),
    "overlay.overlay": Choice(
        "four positions a thread: their three bytes each come and go one by one", same(512)
    ),
    "philox.bits": Choice(
        "one Philox block a thread, its four words side by side", {8: Configuration(512)}
    ),
    "points.line": Choice("two 16-byte accesses a thread: four loads in flight", accesses(2)),
    "points.noise": Choice(
        "two 16-byte accesses a thread: two draws hide each other's latency", accesses(2)
    ),
    "points.random_line": Choice(
        "one 16-byte access a thread: two of 4 bytes spill on sm_90 beside the draws (Triton 3.7)",
        accesses(1), {"gfx9": accesses(2)},
    ),
    # On gfx9 twice as much would spill scalar registers.
    "pools.maxpool": Choice(
        "four elements a thread, whose places in windows stay in registers", same(512)
    ),
    "pools.maxpool_backward": Choice(
        "four elements a thread, whose places in windows stay in registers", same(512)
    ),
    "ranks.rank": Choice(
        "two 16-byte accesses a thread: four loads in flight beside the ranks'", copies(2)
    ),
    "segments.mask": Choice("two 16-byte accesses a thread: four loads in flight", accesses(2)),
    "segments.segment": Choice(
        "two 16-byte accesses a thread: four loads in flight beside the coalition's", copies(2)
    ),
    "windows.window": Choice(
        "one 16-byte access a thread, whose places along the axes stay in registers; four rows"
        " share the divisions that find them",
        copies(1, tiles=4), {"gfx9": copies(2, tiles=4)}, ("elements", "warps", "tiles"),
    ),
}  # fmt: skip


def configuration(kernel, tensor):
    """The configuration of `kernel`, "file.name", for elements like the tensor's on its device."""
    return TABLE[kernel].at(tensor.element_size(), target_of(tensor.device))


@functools.cache
def target_of(device):
    """What the compilers call a device: "sm_90", "gfx942"; empty for a CPU (the interpreter)."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
