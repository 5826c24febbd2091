"""Points: the inputs of a launch. Programs of one tile of elements run row after row, so that an
example is read from memory once and from L2 for each of its further rows.
"""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on
from .philox import line_draw, normals, place


@triton.jit
def _line(x, baseline, examples, alpha, out, rows, baselines, numel, BLOCK: tl.constexpr):
    # Reads x and baseline once, writes rows * numel points.
    # Layout: x [B, numel], baseline [baselines, numel], out [rows, numel], all contiguous.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    at = (program // rows).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    example = tl.load(examples + row)
    start = tl.load(baseline + (example % baselines) * numel + at, mask=inside)
    end = tl.load(x + example * numel + at, mask=inside)
    point = start + tl.load(alpha + row).to(x.dtype.element_ty) * (end - start)
    tl.store(out + row * numel + at, point, mask=inside)


@triton.jit
def _noise(x, sigma, seed, examples, sample, out, rows, numel, first_block, skip,
           ANTITHETIC: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    # Reads x once, writes rows * numel points; the noise lives in registers alone.
    # Layout: x [B, numel], out [rows, numel] contiguous; a thread owns whole Philox blocks.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    block, at = place(program // rows, first_block, skip, BLOCKS)
    inside = (at >= 0) & (at < numel)
    example, number = tl.load(examples + row), tl.load(sample + row)
    width = tl.load(sigma + example)
    if ANTITHETIC:
        width = tl.where(number % 2 == 1, -width, width)
        number = number >> 1
    point = tl.load(x + example * numel + at, mask=inside)
    noise = normals(tl.load(seed + example), number, block, x.dtype.element_ty)
    point += width.to(x.dtype.element_ty) * noise
    tl.store(out + row * numel + at, point, mask=inside)


@triton.jit
def random_line(x, baselines, sigma, seed, examples, sample, row, count, numel, block, at, inside):
    """(start, noisy end, alpha) of a row's random line, at the elements `at`."""
    example, number = tl.load(examples + row), tl.load(sample + row)
    key, width = tl.load(seed + example), tl.load(sigma + example)
    chosen, alpha = line_draw(key, number, count)
    start = tl.load(baselines + chosen * numel + at, mask=inside)
    end = tl.load(x + example * numel + at, mask=inside)
    if width != 0:
        noise = normals(key, number, block, x.dtype.element_ty)
        end += width.to(x.dtype.element_ty) * noise
    return start, end, alpha.to(x.dtype.element_ty)


@triton.jit
def _random_line(x, baselines, sigma, seed, examples, sample, out, rows, count, numel, first_block,
                 skip, BLOCKS: tl.constexpr):  # fmt: skip
    # Reads x and the drawn baselines once, writes rows * numel points; no noise where sigma is 0.
    # Layout: x [B, numel], baselines [count, numel], out [rows, numel], all contiguous.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    block, at = place(program // rows, first_block, skip, BLOCKS)
    inside = (at >= 0) & (at < numel)
    start, end, alpha = random_line(
        x, baselines, sigma, seed, examples, sample, row, count, numel, block, at, inside
    )
    tl.store(out + row * numel + at, start + alpha * (end - start), mask=inside)


def line_points(x, baseline, examples, alpha):
    """The op `line_points`: [R, *]."""
    x, baseline = x.contiguous(), baseline.contiguous()
    out, numel = _points(x, examples)
    chosen = configuration("points.line", x)
    grid = (len(out) * triton.cdiv(numel, chosen.elements),)
    with on(x):
        _line[grid](x, baseline, examples.contiguous(), alpha.contiguous(), out, len(out),
                    len(baseline), numel, BLOCK=chosen.elements,
                    num_warps=chosen.warps)  # fmt: skip
    return out


def noise_points(x, sigma, seed, examples, sample, antithetic, first_element):
    """The op `noise_points`: [R, *]."""
    x = x.contiguous()
    out, numel = _points(x, examples)
    first_block, skip = divmod(first_element, 4)
    chosen = configuration("points.noise", x)
    grid = (len(out) * triton.cdiv(numel + skip, chosen.elements),)
    with on(x):
        _noise[grid](x, sigma.contiguous(), seed.contiguous(), examples.contiguous(),
                     sample.contiguous(), out, len(out), numel, first_block, skip,
                     ANTITHETIC=antithetic, BLOCKS=chosen.elements // 4,
                     num_warps=chosen.warps)  # fmt: skip
    return out


def random_line_points(x, baselines, sigma, seed, examples, sample, first_element):
    """The op `random_line_points`: [R, *]."""
    x, baselines = x.contiguous(), baselines.contiguous()
    out, numel = _points(x, examples)
    first_block, skip = divmod(first_element, 4)
    chosen = configuration("points.random_line", x)
    grid = (len(out) * triton.cdiv(numel + skip, chosen.elements),)
    with on(x):
        _random_line[grid](x, baselines, sigma.contiguous(), seed.contiguous(),
                           examples.contiguous(), sample.contiguous(), out, len(out),
                           len(baselines), numel, first_block, skip,
                           BLOCKS=chosen.elements // 4, num_warps=chosen.warps)  # fmt: skip
    return out


def _points(x, examples):
    out = torch.empty((len(examples), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return out, x[0].numel()
