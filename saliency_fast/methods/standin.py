from torch.nn import functional


def cam(activations, weights, size, rectify):
    w = (
        weights
        if weights.dim() > 2
        else weights.view(*weights.shape, *(1,) * (activations.dim() - 2))
    )
    m = (w * activations).sum(1)
    if rectify:
        m = m.clamp_min(0)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return functional.interpolate(m[:, None], tuple(size), mode=mode, align_corners=False)[:, 0]


def mask_points(x, fill, mask, item, place):
    rows = mask[place]
    rows = rows.repeat(1, x[0].numel() // rows.shape[1]).view(len(item), *x.shape[1:])
    b = fill.expand(len(x), *x.shape[1:])[item]
    return b + rows * (x[item] - b)
