"""Every mechanism in a straightforward form, the equations of its paper line by line, and timm's modules.

`scsa-book bench modules` measures ours against these. A form takes our module for its parameters only; what
the module does with them is written down here once more, with no thought of speed.
"""

import copy
import importlib.util
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from scsa_book.attention.base import renamed

# ---- channel


def se(m, x):
    s = torch.sigmoid(m.expand(F.relu(m.reduce(x.mean((2, 3))))))
    return x * s[:, :, None, None]


def eca(m, x):
    s = torch.sigmoid(m.conv(x.mean((2, 3))[:, None]))
    return x * s[:, 0, :, None, None]


@lru_cache(1)
def basis(u, v, width, height, length, device, dtype):
    "The DCT basis of every channel, (C, H, W); cached for a size of the map."
    patterns = torch.empty(len(u) * width, height, length, dtype=torch.float64)
    i, j = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, length))
    for g, (a, b) in enumerate(zip(u, v, strict=True)):
        rows = torch.cos(math.pi * (a * height // 7) * i / height)
        columns = torch.cos(math.pi * (b * length // 7) * j / length)
        pattern = torch.outer(rows / rows.norm(), columns / columns.norm())
        patterns[g * width : (g + 1) * width] = pattern
    return patterns.to(device, dtype)


def fca(m, x):
    u, v = (tuple(axis.shares.tolist()) for axis in (m.rows, m.columns))
    z = (x * basis(u, v, m.channels // len(u), *x.shape[2:], x.device, x.dtype)).sum((2, 3))
    s = torch.sigmoid(m.expand(F.relu(m.reduce(z))))
    return x * s[:, :, None, None]


def ge(m, x):
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def sk(m, x):
    u = torch.stack([look(x) for look in m.branches], 1)
    z = F.relu(m.selector.norm(m.selector.reduce(u.sum(1).mean((2, 3)))))
    shares = m.selector.expand(z).view(len(x), u.shape[1], -1, 1, 1).softmax(1)
    return (u * shares).sum(1)


# ---- spatial and self-attention


def shares_of(q, k, scale=1.0):
    "(B, d, N) and (B, d, M) -> (B, N, M)."
    return torch.softmax(torch.bmm(q.transpose(1, 2), k) * scale, -1)


def non_local(m, x):
    pooled = F.max_pool2d(x, 2)
    theta, phi, g = m.theta(x).flatten(2), m.phi(pooled).flatten(2), m.g(pooled).flatten(2)
    received = torch.bmm(g, shares_of(theta, phi, theta.shape[1] ** -0.5).transpose(1, 2))
    return x + m.norm(m.out(received.view(len(x), -1, *x.shape[2:])))


def gc(m, x):
    weights = torch.softmax(m.mask(x).flatten(2), -1)
    context = torch.bmm(x.flatten(2), weights.transpose(1, 2))[:, :, 0]
    shift = m.shift.expand(F.relu(m.shift.norm(m.shift.reduce(context))))
    return x + shift[:, :, None, None]


def danet_position(m, x):
    q, k, v = (layer(x).flatten(2) for layer in (m.query, m.key, m.value))
    received = torch.bmm(v, shares_of(q, k).transpose(1, 2))
    return m.gamma * received.view_as(x) + x


def danet_channel(m, x):
    rows = x.flatten(2)
    energy = torch.bmm(rows, rows.transpose(1, 2))
    shares = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
    return m.gamma * torch.bmm(shares, rows).view_as(x) + x


def strided_sparse(m, x):
    n, stride = x.shape[2] * x.shape[3], x.shape[3]
    i = torch.arange(n, device=x.device)
    apart = i[:, None] - i
    seen = torch.stack([apart.abs() < stride, apart % stride == 0])
    q, k, v = m.qkv(x).reshape(len(x), 3, 2, -1, n).transpose(-2, -1).unbind(1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    shares = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
    return x + m.out((shares @ v).transpose(-2, -1).reshape(x.shape))


# ---- hybrid


def cbam(m, x):
    def perceptron(z):
        return m.channel.expand(F.relu(m.channel.reduce(z)))

    s = torch.sigmoid(perceptron(x.mean((2, 3))) + perceptron(x.amax((2, 3))))
    x = x * s[:, :, None, None]
    p = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
    return x * torch.sigmoid(m.spatial.norm(m.spatial.conv(p)))


def bam(m, x):
    channel = m.channel(x.mean((2, 3)))[:, :, None, None]
    return x * (1 + torch.sigmoid(channel.expand_as(x) * m.spatial(x).expand_as(x)))


def sge(m, x):
    b, c, h, w = x.shape
    g = x.reshape(b * m.groups, c // m.groups, h, w)
    p = (g * g.mean((2, 3), keepdim=True)).sum(1).flatten(1)
    p = p - p.mean(1, keepdim=True)
    p = (p / (p.std(1, keepdim=True) + m.eps)).view(b, m.groups, h, w)
    s = torch.sigmoid(p * m.weight + m.bias).view(b * m.groups, 1, h, w)
    return (g * s).view(b, c, h, w)


def sa(m, x):
    b, c, h, w = x.shape
    first, second = x.reshape(b * m.groups, -1, h, w).chunk(2, 1)
    mc, ms = ([p.view(1, -1, 1, 1) for p in (f.weight, f.bias)] for f in (m.channel, m.spatial))
    first = first * torch.sigmoid(mc[0] * first.mean((2, 3), keepdim=True) + mc[1])
    normalised = F.group_norm(second, second.shape[1], m.norm.weight, m.norm.bias, m.eps)
    second = second * torch.sigmoid(ms[0] * normalised + ms[1])
    parts = torch.cat([first, second], 1).view(b, 2, c // 2, h, w)
    return parts.transpose(1, 2).reshape(b, c, h, w)


def ca(m, x):
    strips = torch.cat([x.mean(3), x.mean(2)], 2)
    f = m.norm(m.reduce(strips))
    f_h, f_w = (f * F.relu6(f + 3) / 6).split(x.shape[2:], 2)
    return x * torch.sigmoid(m.height(f_h))[..., None] * torch.sigmoid(m.width(f_w))[:, :, None]


def ema(m, x):
    b, c, h, w = x.shape
    g = x.reshape(b * m.factor, -1, h, w)
    u = m.cross.mix(torch.cat([g.mean(3), g.mean(2)], 2))
    u_h, u_w = u.split([h, w], 2)
    norm = m.cross.norm
    p = g * torch.sigmoid(u_h)[..., None] * torch.sigmoid(u_w)[:, :, None]
    p, t = F.group_norm(p, norm.num_groups, norm.weight, norm.bias, norm.eps), m.cross.conv(g)
    known, seen = (torch.softmax(a.mean((2, 3)), 1)[:, None] for a in (p, t))
    s = torch.sigmoid(known @ t.flatten(2) + seen @ p.flatten(2)).view(-1, 1, h, w)
    return (g * s).reshape(b, c, h, w)


def ela(m, x):
    def gates(z):
        norm = m.strip.norm
        z = F.group_norm(m.strip.conv(z), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return torch.sigmoid(z)

    return x * gates(x.mean(3))[..., None] * gates(x.mean(2))[:, :, None]


def cpca(m, x):
    def gates(z):
        return torch.sigmoid(m.channel.expand(F.relu(m.channel.reduce(z))))

    x = F.gelu(m.project(x))
    x = x * (gates(x.mean((2, 3))) + gates(x.amax((2, 3))))[:, :, None, None]
    u = m.spatial.window(x)
    around = u + m.spatial.strips[0](u) + m.spatial.strips[1](u) + m.spatial.strips[2](u)
    return m.project(x * m.project(around))


# ---- collaboration


def entropy(x, axis):
    return -(torch.softmax(x, axis) * torch.log_softmax(x, axis)).sum(axis)


def stretched(h):
    low, high = (f(h.flatten(1), 1)[:, None] for f in (torch.amin, torch.amax))
    return ((h.flatten(1) - low) / (high - low + 1e-5)).view_as(h)


def cat(m, x):
    c = x.shape[1]
    t = torch.arange(-2, 3, dtype=torch.float64)
    taps = torch.exp(-(t**2) / 2)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).to(x).expand(c, 1, 5, 5)
    smooth = F.conv2d(x, kernel, padding=2, groups=c)
    descriptors = x.mean((2, 3)), smooth.amax((2, 3)), stretched(entropy(x.flatten(2), 2))
    weights = m.channel.interior.values
    l_channel = sum(w * m.channel.perceptron(z) for w, z in zip(weights, descriptors, strict=True))
    descriptors = -x.mean(1), smooth.amax(1), stretched(entropy(x, 1))
    weights = m.spatial.interior.values
    l_spatial = m.spatial.conv(sum(w * p for w, p in zip(weights, descriptors, strict=True))[:, None])
    shares = torch.softmax(m.exterior.values, 0)
    channel = torch.sigmoid(l_channel)[:, :, None, None].expand_as(x)
    return x * (shares[0] * channel + shares[1] * torch.sigmoid(l_spatial).expand_as(x))


# ---- synergy


def smsa(m, x):
    def gates(z, norm):
        z = torch.cat([conv(part) for conv, part in zip(m.convs, z.chunk(4, 1), strict=True)], 1)
        return torch.sigmoid(F.group_norm(z, norm.num_groups, norm.weight, norm.bias, norm.eps))

    return x * gates(x.mean(3), m.norm_h)[..., None] * gates(x.mean(2), m.norm_w)[:, :, None]


def pcsa(m, x):
    z = F.avg_pool2d(x, 7)
    z = F.group_norm(z, 1, m.norm.weight, m.norm.bias, m.norm.eps)
    q, k, v = (layer(z).flatten(2) for layer in (m.q, m.k, m.v))
    shares = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(x.shape[1]), -1)
    return x * torch.sigmoid((shares @ v).mean(-1))[:, :, None, None]


def scsa(m, x):
    return pcsa(m.pcsa, smsa(m.smsa, x))


FORMS = (
    se, eca, fca, ge, sk, non_local, gc, danet_position, danet_channel, strided_sparse, cbam, bam, sge, sa,
    ca, ema, ela, cpca, cat, smsa, pcsa, scsa,
)  # fmt: skip


class Straightforward(nn.Module):
    def __init__(self, form, ours):
        super().__init__()
        self.form, self.parameters_of = form, copy.deepcopy(ours)

    def forward(self, x):
        return self.form(self.parameters_of, x)


# ---- timm


def loaded(theirs, ours, names):
    "Our weights in a module of timm: `names` are prefixes, ours -> theirs."
    own, state = theirs.state_dict(), renamed(ours.state_dict(), names)
    theirs.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
    return theirs.to(next(ours.parameters(), torch.empty(0)).dtype)


def timm_se(ours):
    from timm.layers import SEModule

    theirs = SEModule(ours.channels, rd_ratio=1 / 16, rd_divisor=1)
    return loaded(theirs, ours, {"reduce": "fc1", "expand": "fc2"})


def timm_eca(ours):
    from timm.layers import EcaModule

    return loaded(EcaModule(ours.channels), ours, {})


def timm_ge(ours):
    from timm.layers import GatherExcite

    return GatherExcite(ours.channels, extent=0, use_mlp=False)


def timm_sk(ours):
    from timm.layers import SelectiveKernel

    kw = {"groups": ours.branches[0][0].groups, "rd_channels": ours.selector.reduce.out_features}
    theirs = SelectiveKernel(ours.channels, split_input=False, **kw)
    names = {"selector.reduce": "attn.fc_reduce", "selector.norm": "attn.bn"}
    names |= {"selector.expand": "attn.fc_select"}
    for i in (0, 1):
        names |= {f"branches.{i}.0": f"paths.{i}.conv", f"branches.{i}.1": f"paths.{i}.bn"}
    return loaded(theirs, ours, names)


def timm_cbam(ours):
    from timm.layers.cbam import CbamModule

    theirs = CbamModule(ours.channels, rd_channels=ours.channel.reduce.out_features, mlp_bias=True)
    names = {"channel.reduce": "channel.fc1", "channel.expand": "channel.fc2"}
    names |= {"spatial.conv": "spatial.conv.conv", "spatial.norm": "spatial.conv.bn"}
    loaded(theirs, ours, names)
    kernel = theirs.spatial.conv.conv.weight
    kernel.data = kernel.data.flip(1)  # theirs takes the mean first
    return theirs


def timm_gc(ours):
    from timm.layers import GlobalContext

    theirs = GlobalContext(ours.channels, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)
    theirs.mlp_add.norm.eps = ours.shift.norm.eps
    names = {"mask": "conv_attn", "shift.reduce": "mlp_add.fc1", "shift.norm": "mlp_add.norm"}
    return loaded(theirs, ours, names | {"shift.expand": "mlp_add.fc2"})


def timm_ca(ours):
    from timm.layers.coord_attn import CoordAttn

    theirs = CoordAttn(ours.channels, rd_channels=ours.reduce.out_channels, bias=True)
    names = {"reduce": "conv1", "norm": "bn1", "height": "conv_h", "width": "conv_w"}
    return loaded(theirs, ours, names)


MODULES = (timm_se, timm_eca, timm_ge, timm_sk, timm_cbam, timm_gc, timm_ca)
TIMM = {make.__name__.removeprefix("timm_"): make for make in MODULES}


# ---- for `scsa-book bench modules`


def straightforward(name):
    "ours -> the straightforward form with the same weights."
    form = {f.__name__: f for f in FORMS}[name]
    return lambda ours: Straightforward(form, ours)


PEERS = {f.__name__: straightforward(f.__name__) for f in FORMS}
if importlib.util.find_spec("timm"):
    PEERS |= TIMM
