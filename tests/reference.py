"""Every training's step a second time, in float64, from the paper and the works it builds on.

Nothing of the package is used but the weights of its modules, as dicts from names to tensors, and
its settings, a tree of plain numbers that is called `c` here. Where a training draws random
numbers, the same ones are drawn by hand, from generators seeded with a hash of what they are for.

Equations, sections and tables without a source are those of SeQ-GAN (arXiv:2212.03185).
"""

import hashlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

LOW = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
SEM = ("relu5_3", "logit")


# What a training leaves behind: the tests fill the same classes from a run of the package.


@dataclass
class Update:
    """One step of one optimiser."""

    model: str
    rate: float
    gradients: dict  # as they reach the optimiser, before clipping
    norm: float
    clipped: dict
    weights: dict  # after the step


@dataclass
class Step:
    """What a step of a training logs, and the updates of weights that it makes, in order."""

    terms: dict
    updates: list


@dataclass
class Training:
    """A whole training."""

    start: dict  # {model: weights} before the first step
    steps: list = field(default_factory=list)
    final: dict = field(default_factory=dict)  # {model: weights}, as they are saved
    numbers: dict = field(default_factory=dict)  # of the validation at the end


# Random numbers


def seed_of(*values):
    """63 bits of the SHA-256 of what the random numbers are for."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") // 2


def generator(*values):
    """A random generator for one purpose."""
    return torch.Generator().manual_seed(seed_of(*values))


# Images


def to_numbers(pixels):
    """Bytes from 0 to 255 as numbers from -1 to 1."""
    return pixels.double() / 127.5 - 1


def image_batch(images, labels, size, seed, t, flip=True):
    """The batch of step t: each epoch has its own order; with `flip`, half is mirrored."""
    per_epoch = len(images) // size
    epoch, index = t // per_epoch, t % per_epoch
    order = torch.randperm(len(images), generator=generator("order", seed, epoch))
    rows = order[index * size : (index + 1) * size]
    mirrored = torch.rand(size, generator=generator("flip", seed, t)) < (0.5 if flip else 0)
    pixels = images[rows]
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    return to_numbers(pixels), labels[rows]


def shifted(images, fraction, seed, t):
    """All images moved by the same, at most a fraction of their side; the border repeats."""
    side = images.shape[-1]
    most = int(fraction * side)
    right, down = torch.randint(-most, most + 1, (2,), generator=generator("shift", seed, t))
    rows = (torch.arange(side) + down).clamp(0, side - 1)
    columns = (torch.arange(side) + right).clamp(0, side - 1)
    return images[:, :, rows][..., columns]


# Layers: `w` holds the weights, `name` says which of them


def under(w, name):
    """The weights of the module `name`, by their names in it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}


def conv(x, w, name, stride=1, padding=0):
    """A convolution."""
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)


def linear(x, w, name):
    """A linear layer, with or without bias."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def standardised(x, axes, epsilon=1e-5):
    """x with mean 0 and (biased) variance 1 along `axes`."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + epsilon).sqrt()


def group_norm(x, w, name):
    """Wu and He, 2018: 32 groups as in VQGAN, but of four channels or more."""
    channels = x.shape[1]
    groups = math.gcd(32, channels // 4)
    y = standardised(x.unflatten(1, (groups, -1)), (2, 3, 4)).flatten(1, 2)
    return y * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def layer_norm(x, w, name):
    """Ba et al., 2016."""
    return standardised(x, (-1,)) * w[f"{name}.weight"] + w[f"{name}.bias"]


def batch_norm(x, w, name, moments=None):
    """Ioffe and Szegedy, 2015: by the running moments, or, in training, by those of the batch.

    In training, a dict `moments` takes the new running ones: a tenth of the batch's, with the
    unbiased variance.
    """
    if moments is None:
        mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    else:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        count = x.numel() // x.shape[1]
        for kind, new in (("mean", mean), ("var", variance * count / (count - 1))):
            old = w[f"{name}.running_{kind}"]
            moments[f"{name}.running_{kind}"] = (0.9 * old + 0.1 * new).detach()
        moments[f"{name}.num_batches_tracked"] = w[f"{name}.num_batches_tracked"] + 1
    y = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return y * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def relu(x):
    """The positive part."""
    return x * (x > 0)


def leaky_relu(x):
    """The negative part is multiplied by 0.2, as in StyleGAN2."""
    return torch.where(x > 0, x, 0.2 * x)


def silu(x):
    """Swish: x sigmoid(x)."""
    return x / (1 + (-x).exp())


def gelu(x):
    """Hendrycks and Gimpel, 2016: x times the normal distribution function."""
    return x * (1 + (x / math.sqrt(2)).erf()) / 2


class Dropout:
    """Srivastava et al., 2014: values are kept with probability 1 - rate, and those enlarged.

    Masks are drawn one after the other from one generator; without it nothing is dropped.
    """

    def __init__(self, rate=0.0, generator=None):
        self.rate, self.generator = rate, generator

    def __call__(self, x):
        if self.rate == 0 or self.generator is None:
            return x
        kept = torch.empty(x.shape).bernoulli_(1 - self.rate, generator=self.generator)
        return x * kept.double() / (1 - self.rate)


# The tokenizer's networks (Table 7)


def residual_block(x, w):
    """GN-Swish-Conv-GN-Swish-Conv beside a skip connection."""
    y = conv(silu(group_norm(x, w, "branch.0")), w, "branch.2", padding=1)
    y = conv(silu(group_norm(y, w, "branch.3")), w, "branch.5", padding=1)
    return y + (conv(x, w, "skip") if "skip.weight" in w else x)


def residual_blocks(x, w, name, count):
    """As many as Table 7 has; a missing one is a KeyError."""
    for i in range(count):
        x = residual_block(x, under(w, f"{name}.{i}"))
    return x


def encode(images, w, s):
    """Images (B, 3, H, W) -> features (B, D, h, w); `s` are the settings of the autoencoder."""
    x, last = conv(images, w, "input", padding=1), len(s.multipliers) - 1
    for level in range(last + 1):
        if level > 0:  # as VQGAN: zeros to the right and below only
            x = conv(F.pad(x, (0, 1, 0, 1)), w, f"down.{level - 1}.conv", stride=2)
        count = s.bottom if level == last else s.blocks
        x = residual_blocks(x, w, f"levels.{level}", count)
    return conv(silu(group_norm(x, w, "output.0")), w, "output.2", padding=1)


def decode(z, w, s, pairs):
    """Quantised features (B, D, h, w) -> images (B, 3, H, W).

    Each level ends with `pairs` of B&D attention.
    """
    x = conv(z, w, "input", padding=1)
    for level in range(len(s.multipliers)):  # the coarsest first
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(x, w, f"up.{level - 1}.conv", padding=1)
        count = (s.blocks if level else s.bottom) + s.extra_blocks
        x = residual_blocks(x, w, f"levels.{level}", count)
        for pair in range(pairs):
            for kind in ("regional", "dilated"):
                own = under(w, f"attention.{level}.{pair}.{kind}")
                x = group_attention(x, own, kind, s)
    return conv(silu(group_norm(x, w, "output.0")), w, "output.2", padding=1)


def groups_of(height, width, kind, s):
    """The group of each position (H W,) in HiT's attention (Zhao et al., 2021).

    A dilated group has a fixed step, as in their code (`s.dilation` "hit"), or a fixed size.
    """

    def along(side):
        position, size = torch.arange(side), min(s.attention_block, side)
        if kind == "regional":
            return position // size
        return position % (size if s.dilation == "hit" else side // size)

    return (along(height)[:, None] * width + along(width)).flatten()


def group_attention(x, w, kind, s):
    """Attention of all positions to all, but for those of other groups; residual."""
    batch, channels, height, width = x.shape
    group, heads = groups_of(height, width, kind, s), s.attention_heads
    q, k, v = (
        conv(group_norm(x, w, "norm"), w, "qkv").view(batch, 3, heads, -1, height * width).unbind(1)
    )
    scores = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(channels // heads)
    scores = scores.masked_fill(group[:, None] != group, float("-inf"))
    y = torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), v)
    return x + conv(y.reshape(x.shape), w, "project")


# The codebook (Equations 1 and 2, section 3.4)


def unit(x):
    """Vectors of length 1."""
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def compared(z, w, q):
    """What of features (B, D, h, w) is compared with the codes, (B, h, w, d); `q`: the settings."""
    z = z.permute(0, 2, 3, 1)
    if q.normalize:
        z = standardised(z, (-1,))
    return unit(linear(z, w, "down")) if q.factors else z


def codes_of(w, q):
    """The vectors of the codes (K, d), of length 1 if they are factorised (ViT-VQGAN)."""
    return unit(w["codebook"]) if q.factors else w["codebook"]


def squared_distances(features, codes):
    """Of each of features (N, d) to each of codes (K, d): (N, K)."""
    return (features[:, None] - codes).square().sum(2)


def entropy(p):
    """In nats; what has probability 0 adds nothing."""
    return -torch.special.xlogy(p, p).sum()


def quantise(z, w, q):
    """-> z_q (B, D, h, w), codes (B, h, w), and a dict.

    That has `codebook`, `commitment`, `entropy`, and the `features` (B, h, w, d) that are compared.
    """
    features, vectors = compared(z, w, q), codes_of(w, q)
    flat = features.flatten(0, 2)
    squares = squared_distances(flat, vectors)
    codes = squares.argmin(1)  # Equation 1
    chosen = vectors[codes].view(features.shape)

    # A root has no slope at 0, where the codes start: what is below 1e-6 counts as 1e-6.
    distances = squares.clamp_min(1e-6).sqrt() if q.distance == "l2" else squares
    soft = (-distances / q.temperature).softmax(1).view(len(z), -1, q.codes)
    if q.entropy_over == "image":  # "average D along the spatial size"
        usage_entropy = sum(entropy(image.mean(0)) for image in soft) / len(z)
    else:
        usage_entropy = entropy(soft.mean((0, 1)))
    size = features[0].numel() if q.reduction == "sum" else 1
    terms = {
        "codebook": (features.detach() - chosen).square().mean() * size,
        "commitment": (chosen.detach() - features).square().mean() * size,
        "entropy": usage_entropy,
        "features": features,
    }
    through = features + (chosen - features).detach()  # the gradient passes straight through
    z_q = linear(through, w, "up") if q.factors else through
    return z_q.permute(0, 3, 1, 2), codes.view(features.shape[:3]), terms


def first_codes(features, count, seed):
    """The codebook starts as `count` of the features (N, d), none twice."""
    order = torch.randperm(len(features), generator=generator("codebook", seed))
    return features[order[:count]]


def lloyd(features, w, q, seed, most=100):
    """The codebook as the k-means of features (N, d), by Lloyd's steps from the present codes.

    A code that no feature is nearest to moves to a random one (Lancucki et al., 2020).
    """
    w, draws, before = dict(w), generator("reestimate", seed), None
    for _ in range(most):
        nearest = squared_distances(features, codes_of(w, q)).argmin(1)
        if before is not None and (nearest == before).all():
            break
        order = torch.randperm(len(features), generator=draws)
        moved = []
        for code in range(q.codes):
            own = features[nearest == code]
            moved.append(own.mean(0) if len(own) else features[order[code]])
        w["codebook"], before = torch.stack(moved), nearest
    return w["codebook"]


# The feature networks


def vgg(images, w, s, moments=None, dropout=None):
    """VGG-16 (Simonyan and Zisserman, 2015), as its settings `s` say: {tap: features}."""
    dropout = dropout or Dropout()
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    x, i, taps = ((images + 1) / 2 - mean) / deviation, 0, {}
    for name, convolutions, pool in zip(LOW, (2, 2, 3, 3, 3), s.pools, strict=True):
        for _ in range(convolutions):
            x = conv(x, w, f"features.{i}", padding=1)
            if s.batch_norm:
                x = batch_norm(x, w, f"features.{i + 1}", moments)
            x = relu(x)
            i += 3 if s.batch_norm else 2
        taps[name] = x
        if pool:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
            i += 1
    size = x.shape[-1] // s.head
    x = x.unfold(2, size, size).unfold(3, size, size).mean((4, 5)).flatten(1)
    x = dropout(relu(linear(x, w, "classifier.0")))
    x = dropout(relu(linear(x, w, "classifier.3")))
    return taps | {"logit": linear(x, w, "classifier.6")}


def perceptual_terms(fake, real, w, s, alpha, layers, squares=None):
    """Equation 3: the squared distance of features over H W C, summed over `low` and `sem` layers.

    Or, with `layers`, just those (Table 6). A layer's distance is divided by its own of `squares`,
    if there are any, which are the mean squares of features of real images (Gatys et al., 2015).
    """
    found, wanted = vgg(fake, w, s), vgg(real, w, s)
    term = {}
    for name, features in found.items():
        distances = (features - wanted[name]).square().flatten(1).sum(1)
        term[name] = (distances / features[0].numel()).mean()
        if squares is not None:
            term[name] = term[name] / squares[name]
    low, sem = sum(term[name] for name in LOW), sum(term[name] for name in SEM)
    chosen = sum(term[name] for name in layers) if layers else alpha * sem + (1 - alpha) * low
    return {"low": low, "sem": sem, "perceptual": chosen}


def on_grid(x, side):
    """Maps (B, C, H, H) on a grid of `side`: averaged where theirs is finer, or else repeated."""
    if x.shape[-1] >= side:
        block = x.shape[-1] // side
        return x.unfold(2, block, block).unfold(3, block, block).mean((4, 5))
    times = side // x.shape[-1]
    return x.repeat_interleave(times, 2).repeat_interleave(times, 3)


def misalignment(features, seen, w):
    """GigaTok's (Xiong et al., 2025), of features (B, h, w, d) and `seen` (B, C, H, H).

    At each position one minus the cosine of what a perceptron makes of the one, and the other.
    """
    x = silu(linear(features, w, "projection.0"))
    x = linear(silu(linear(x, w, "projection.2")), w, "projection.4")
    seen = on_grid(seen, features.shape[1]).permute(0, 2, 3, 1)
    return (1 - (unit(x) * unit(seen)).sum(-1)).mean()


# The discriminator (StyleGAN2, Karras et al., 2020) and its losses


def blur(x, padding):
    """The filter [1, 3, 3, 1] / 8 along rows and columns, zeros outside."""
    x = F.pad(x, (padding,) * 4)
    for axis in (2, 3):
        length = x.shape[axis] - 3
        x = sum(tap * x.narrow(axis, i, length) for i, tap in enumerate((1, 3, 3, 1))) / 8
    return x


def equalised(x, w, name, stride=1, padding=0):
    """A layer with equalised learning rate: the weight is divided by the root of its fan-in."""
    weight = w[f"{name}.weight"]
    weight = weight / math.sqrt(weight[0].numel())
    if weight.ndim == 2:
        return x @ weight.T + w[f"{name}.bias"]
    return F.conv2d(x, weight, w.get(f"{name}.bias"), stride, padding)


def activation(x):
    """StyleGAN2 keeps the variance by a factor of the root of 2."""
    return math.sqrt(2) * leaky_relu(x)


def minibatch_deviation(x):
    """A channel more: the mean standard deviation among the (at most four) images of a group."""
    batch = len(x)
    groups = batch // max(size for size in (1, 2, 3, 4) if batch % size == 0)
    channel = torch.empty(batch, 1, *x.shape[2:], dtype=torch.float64)
    for group in range(groups):
        variance = x[group::groups].var(0, unbiased=False)
        channel[group::groups] = (variance + 1e-8).sqrt().mean()
    return torch.cat([x, channel], 1)


def discriminate(images, w):
    """Images (B, 3, H, W) -> logits (B,)."""
    x = activation(equalised(images, w, "input"))
    for i in range(int(math.log2(images.shape[-1] / 4))):  # down to 4 x 4
        block = under(w, f"blocks.{i}")
        y = activation(equalised(x, block, "first", padding=1))
        y = activation(equalised(blur(y, 2), block, "second", stride=2))
        x = (y + equalised(blur(x, 1)[:, :, ::2, ::2], block, "skip")) / math.sqrt(2)
    x = activation(equalised(minibatch_deviation(x), w, "last", padding=1))
    x = activation(equalised(x.flatten(1), w, "hidden"))
    return equalised(x, w, "logit")[:, 0]


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))), for large x too."""
    return -torch.logaddexp(torch.zeros_like(x), -x)


def critic_loss(real, fake):
    """-log D(x) - log(1 - D(x')) (Goodfellow et al., 2014)."""
    return -log_sigmoid(real).mean() - log_sigmoid(-fake).mean()


def generator_loss(fake):
    """-log D(x'), the form that does not saturate."""
    return -log_sigmoid(fake).mean()


def gradient_penalty(images, w):
    """R1 (Mescheder et al., 2018), without its weight."""
    images = images.clone().requires_grad_()
    logits = discriminate(images, w).sum()
    (slope,) = torch.autograd.grad(logits, images, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def ramp(t, start, length):
    """From 0 at step `start` to 1, `length` steps later."""
    if t < start:
        return 0.0
    return min(1.0, (t - start) / length) if length else 1.0


def adversarial_scale(reconstruction, adversarial, weight, bound):
    """`weight`, or what makes the adversarial gradient `bound` times the reconstruction's."""
    sizes = [slope.square().sum().sqrt() for slope in (reconstruction, adversarial)]
    return min(weight, float(bound * sizes[0] / sizes[1]))


# The transformers (Table 8)


def transform(codes, labels, w, c, dropout):
    """Codes (B, N), which a masked transformer gets with its mask tokens, -> logits (B, N, K)."""
    s, batch = c.transformer, len(codes)
    n = w["position_embedding.weight"].shape[0]
    row = labels if s.conditional else torch.zeros(batch, dtype=torch.int64)
    start = w["start_embedding.weight"][row][:, None]
    x = w["code_embedding.weight"][codes]
    if s.causal:
        x = torch.cat([start, x[:, :-1]], 1) + w["position_embedding.weight"]
    else:
        x = torch.cat([start, x + w["position_embedding.weight"]], 1)
    x = dropout(x)
    for i in range(s.blocks):
        block = under(w, f"blocks.{i}")
        y = self_attention(layer_norm(x, block, "norm1"), under(block, "attention"), s, dropout)
        x = x + dropout(y)
        y = linear(gelu(linear(layer_norm(x, block, "norm2"), block, "mlp.0")), block, "mlp.2")
        x = x + dropout(y)
    return linear(layer_norm(x[:, -n:], w, "norm"), w, "head")


def self_attention(x, w, s, dropout):
    """Vaswani et al., 2017; causal, or of all positions to all."""
    batch, n, dim = x.shape
    q, k, v = linear(x, w, "qkv").view(batch, n, 3, s.heads, -1).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(dim // s.heads)
    if s.causal:
        later = torch.arange(n) > torch.arange(n)[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    y = torch.einsum("bhij,bjhd->bihd", dropout(scores.softmax(-1)), v)
    return linear(y.reshape(batch, n, dim), w, "project")


def hidden_codes(batch, n, *seed):
    """MaskGIT's masks (Chang et al., 2022): of each row a fraction cos(r pi / 2), r uniform."""
    uniform = torch.rand(batch, 1 + n, generator=generator("masks", *seed))
    masks = torch.zeros(batch, n, dtype=torch.bool)
    for mask, (r, *scores) in zip(masks, uniform.tolist(), strict=True):
        count = math.ceil(n * math.cos(r * math.pi / 2))
        for position in sorted(range(n), key=scores.__getitem__)[:count]:
            mask[position] = True
    return masks


def cross_entropy(logits, wanted, smoothing=0.0):
    """In nats, of targets that give `smoothing` of their probability to all classes alike.

    Targets are classes, or the shares of all classes.
    """
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    if wanted.is_floating_point():
        right = (wanted * log_p).sum(-1)
    else:
        right = log_p.gather(-1, wanted[..., None])[..., 0]
    return -((1 - smoothing) * right + smoothing * log_p.mean(-1)).mean()


def accuracy(logits, wanted):
    """How often the largest logit is the right one."""
    return (logits.argmax(-1) == wanted).double().mean()


def code_terms(codes, labels, mask, w, c, dropout):
    """The loss of every code given those before it (AR), or of the hidden ones (NAR)."""
    seen = codes if c.transformer.causal else torch.where(mask, c.quantizer.codes, codes)
    logits = transform(seen, labels, w, c, dropout)[mask]
    wanted = codes[mask]
    return {"loss": cross_entropy(logits, wanted), "accuracy": accuracy(logits, wanted)}


# Optimisers


class Adam:
    """Kingma and Ba, 2015; with `decay`, AdamW (Loshchilov and Hutter, 2019)."""

    def __init__(self, betas, decay=0.0, decaying=()):
        self.betas, self.decay, self.decaying, self.state = betas, decay, decaying, {}

    def step(self, name, weight, gradient, rate):
        """The new weight called `name`."""
        n, first, second = self.state.get(name, (0, 0.0, 0.0))
        beta1, beta2 = self.betas
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        self.state[name] = n + 1, first, second
        direction = first / (1 - beta1 ** (n + 1))
        size = (second / (1 - beta2 ** (n + 1))).sqrt() + 1e-8
        if name in self.decaying:
            weight = weight - rate * self.decay * weight
        return weight - rate * direction / size


class Nesterov:
    """Gradient descent with Nesterov's momentum (Sutskever et al., 2013); L2 in the gradient."""

    def __init__(self, momentum, decay):
        self.momentum, self.decay, self.velocity = momentum, decay, {}

    def step(self, name, weight, gradient, rate):
        """The new weight called `name`."""
        gradient = gradient + self.decay * weight
        self.velocity[name] = self.momentum * self.velocity.get(name, 0.0) + gradient
        return weight - rate * (gradient + self.momentum * self.velocity[name])


def update(model, weights, gradients, rate, optimiser, clip=0):
    """The `Update` of weights whose gradient is made no longer than `clip` before; 0: whatever."""
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    clipped = {name: scale * g for name, g in gradients.items()}
    moved = {name: optimiser.step(name, weights[name], g, rate) for name, g in clipped.items()}
    return Update(model, rate, gradients, norm, clipped, weights | moved)


def leaves(weights, names=None):
    """Copies of weights, of which those called `names` (or all numbers) take a gradient."""
    copies = {name: value.detach().clone() for name, value in weights.items()}
    for name, value in copies.items():
        wanted = name in names if names is not None else "running" not in name
        if wanted and value.is_floating_point():
            value.requires_grad_()
    return copies


def slopes(loss, weights):
    """{name: gradient} of the loss by each of the weights that take one."""
    wanted = {name: value for name, value in weights.items() if value.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


# Learning rates


def cosine(t, steps, first, last):
    """Table 9: half a cosine from `first` to `last`."""
    return last + (first - last) * math.cos(math.pi / 2 * t / steps) ** 2


def one_cycle(t, steps, most, warmup):
    """Linear from 0 to the most over a fraction `warmup`, then half a cosine to 0."""
    peak = warmup * steps
    return most * t / peak if t < peak else cosine(t - peak, steps - peak, most, 0.0)


def transformer_rate(t, s):
    """Table 10: constant, then a decay to the last rate; times a linear rise at the beginning."""
    progress = max(0, t - s.decay_start) / (s.steps - s.decay_start)
    if s.decay == "exponential":
        rate = math.exp((1 - progress) * math.log(s.lr) + progress * math.log(s.lr_end))
    else:
        rate = (1 - progress) * s.lr + progress * s.lr_end
    return rate * min(1, (t + 1) / s.warmup) if s.warmup else rate


# Trainings


def detached(terms):
    """Terms, tensors or numbers, as numbers."""
    return {name: float(torch.as_tensor(value).detach()) for name, value in terms.items()}


def mixed(images, labels, classes, t):
    """Images and the shares that classes have in them, mixed in odd steps.

    MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019) take turns.
    """
    shares = F.one_hot(labels, classes).double()
    if t % 2 == 0:
        return images, shares
    concentration = torch.tensor([0.3 if t % 4 == 1 else 1.0])
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    others = images.roll(1, 0)
    if t % 4 == 1:
        images = share * images + (1 - share) * others
    else:
        side = images.shape[-1]
        x, y = (int(torch.randint(side, (1,))) for _ in range(2))
        half = int(side * math.sqrt(1 - share) / 2)
        inside = torch.zeros(side, side, dtype=torch.bool)
        inside[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = True
        images = torch.where(inside, others, images)
        share = 1 - float(inside.double().mean())
    return images, share * shares + (1 - share) * shares.roll(1, 0)


def strongly_changed(images, size):
    """Random squares of images, turned, recoloured, blurred, cut out; then up to a tenth of noise.

    Four images at a time are changed alike. The changes are torchvision's.
    """
    change = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1)),
            v2.RandomHorizontalFlip(0.5),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.4, hue=0.05),
            v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.0))], p=0.2),
            v2.RandomErasing(p=0.2, scale=(0.02, 0.2)),
        ]
    )
    fours = [images[i : i + 4] for i in range(0, len(images), 4)]
    images = 2 * torch.cat([change((four + 1) / 2) for four in fours]) - 1
    levels = torch.rand(len(images), 1, 1, 1) / 10
    return (images + levels * torch.randn(images.shape)).clamp(-1, 1)


def adversarially_changed(images, most, loss_of):
    """Images with one step towards a larger loss, from a random start (Wong et al., 2020)."""
    start = most * (2 * torch.rand(images.shape) - 1)
    changed = start.requires_grad_()
    slope = torch.autograd.grad(loss_of((images + changed).clamp(-1, 1)), changed)[0]
    changed = (start.detach() + 5 / 4 * most * slope.sign()).clamp(-most, most)
    return (images + changed).clamp(-1, 1)


def with_mean_moments(weights, batches, forward):
    """Weights with batch normalisation's moments: those of `batches`, averaged."""
    seen = []
    for images in batches:
        at_zero = {k: torch.zeros_like(v) for k, v in weights.items() if ".running_" in k}
        moments = {}
        forward(images, weights | at_zero, moments)
        seen.append({k: 10 * moments[k] for k in at_zero})  # a tenth is what a batch adds
    means = {k: sum(batch[k] for batch in seen) / len(seen) for k in seen[0]}
    counts = {k: torch.tensor(len(seen)) for k in weights if "num_batches" in k}
    return weights | means | counts


def train_classifier(c, train, val, start):
    """A perceptual network on labels."""
    s, seed, weights, training = c.classifier, c.seed, start["net"], Training(start)
    optimiser = Nesterov(s.momentum, s.weight_decay)
    averaged = weights
    classes = len(weights["classifier.6.bias"])

    def logits_of(images, w, moments=None, dropout=None):
        return vgg(images, w, c.vgg, moments, dropout)["logit"]

    def batch(t):
        size = min(s.batch, len(train.images))
        return image_batch(train.images, train.labels, size, seed, t, s.flip)

    for t in range(s.steps):
        images, labels = batch(t)
        w, moments = leaves(weights), {}
        dropout = Dropout(c.vgg.dropout, generator("step", seed, t, 0))
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("step", seed, t, 0))
            if s.augment == "strong":
                images, target = strongly_changed(images, s.size or images.shape[-1]), labels
            else:
                images, target = shifted(images, s.shift, seed, t), labels
            if s.mix:
                images, target = mixed(images, labels, classes, t)
            if s.adversarial:
                half = len(images) // 2

                def hurt(x, w=w, half=half, target=target, seen=moments):
                    return cross_entropy(logits_of(x, w, seen), target[:half])

                changed = adversarially_changed(images[:half], s.adversarial, hurt)
                images = torch.cat([changed, images[half:]])
        logits = logits_of(images, w | moments, moments, dropout)
        loss = cross_entropy(logits, target, s.smoothing)
        rate = one_cycle(t, s.steps, s.lr, s.warmup)
        made = update("net", weights | moments, slopes(loss, w), rate, optimiser)
        weights = made.weights
        share = 1 / (1 + s.ema * t)  # the first weights are all that there is
        averaged = {k: averaged[k] + share * (weights[k] - averaged[k]) for k in weights}
        terms = detached({"loss": loss, "accuracy": accuracy(logits, labels)})
        training.steps.append(Step(terms, [made]))

    if s.ema:
        size = s.size or train.images.shape[-1]
        batches = (F.adaptive_avg_pool2d(batch(t)[0], size) for t in range(100))
        weights = with_mean_moments(averaged, batches, logits_of)
    found = accuracy(logits_of(to_numbers(val.images), weights), val.labels)
    training.numbers, training.final = {"accuracy": float(found)}, {"net": weights}
    return training


class TokenizerTraining:
    """What both phases of the tokenizer have in common; `s` are the settings of the phase.

    `beginnings` are the steps at which the discriminator begins to train and the decoder to listen
    to it, and the length of the ramp after that; `pairs` the B&D attention at each level of the
    decoder; `trained` the names of the tokenizer's weights that are trained; `squares` what layers
    of the perceptual network are scaled by. An `alignment` in the start is that of `misalignment`.
    """

    def __init__(self, c, s, train, features, start, squares=None):
        self.c, self.s, self.train, self.features = c, s, train, features
        self.beginnings = c.adversarial.train_start, c.adversarial.start, c.adversarial.ramp
        self.pairs, self.trained = c.autoencoder.attention, list(start["tokenizer"])
        self.tokenizer, self.discriminator = start["tokenizer"], start["discriminator"]
        self.alignment = start.get("alignment")
        betas = {"tokenizer": s.betas, "discriminator": c.adversarial.betas, "alignment": s.betas}
        self.optimisers = {name: Adam(own) for name, own in betas.items()}
        self.squares = squares if c.perceptual.scale_taps else None
        self.mean = None

    def batch(self, t):
        """The images of step t."""
        train, flip = self.train, self.c.tokenizer_training.flip
        return image_batch(train.images, train.labels, self.s.batch, self.c.seed, t, flip)[0]

    def reconstruct(self, images, w):
        """Images as the tokenizer draws them, their codes, and the terms of the quantiser."""
        z = encode(images, under(w, "encoder"), self.c.autoencoder)
        z_q, codes, terms = quantise(z, under(w, "quantizer"), self.c.quantizer)
        fake = decode(z_q, under(w, "decoder"), self.c.autoencoder, self.pairs)
        return fake, codes, terms

    def perceptual(self, fake, images, alpha, layers):
        """Equation 3, or Table 6."""
        w, s = self.features, self.c.vgg
        return perceptual_terms(fake, images, w, s, alpha, layers, self.squares)

    def train_discriminator(self, images, fake, t):
        """One update; the penalty counts for the steps until the next one has its turn."""
        a, w = self.c.adversarial, leaves(self.discriminator)
        loss = critic_loss(discriminate(images, w), discriminate(fake, w))
        total, clip = loss, a.clip
        if t % a.r1_every == 0:
            clip = a.clip if a.clip_r1 else 0
            total = total + a.r1_every * a.r1 / 2 * gradient_penalty(images, w)
        optimiser = self.optimisers["discriminator"]
        made = update("discriminator", self.discriminator, slopes(total, w), a.lr, optimiser, clip)
        self.discriminator = made.weights
        return {"d_loss": loss}, [made]

    def rate(self, t):
        """Of the tokenizer, and of what is trained along with it."""
        return cosine(t, self.s.steps, self.s.lr, self.s.lr_end)

    def align(self, images, features, t):
        """One update of the perceptron alone -> its loss before, the tokenizer's after, [update].

        Its rate, its betas and the limit of its gradient are the tokenizer's; no weight multiplies
        its loss.
        """
        seen, w = vgg(images, self.features, self.c.vgg)["relu5_3"], leaves(self.alignment)
        loss, optimiser = misalignment(features.detach(), seen, w), self.optimisers["alignment"]
        gradients, clip = slopes(loss, w), self.s.clip
        made = update("alignment", self.alignment, gradients, self.rate(t), optimiser, clip)
        self.alignment = made.weights
        return loss, misalignment(features, seen, self.alignment), [made]

    def step(self, t, alpha, layers):
        """Equation 2 with Equation 3, the entropy and the adversarial loss."""
        c, images, w = self.c, self.batch(t), leaves(self.tokenizer, self.trained)
        fake, codes, terms = self.reconstruct(images, w)
        others, updates = {}, []
        if t >= self.beginnings[0]:
            others, updates = self.train_discriminator(images, fake.detach(), t)

        l1 = (fake - images).abs().mean()
        perceptual = self.perceptual(fake, images, alpha, layers)
        loss = reconstruction = l1 + c.perceptual.weight * perceptual["perceptual"]
        listening = c.adversarial.weight * ramp(t, *self.beginnings[1:])
        if listening > 0:
            adversarial = generator_loss(discriminate(fake, self.discriminator))
            (wish,) = torch.autograd.grad(reconstruction, fake, retain_graph=True)
            (push,) = torch.autograd.grad(adversarial, fake, retain_graph=True)
            scale = adversarial_scale(wish, push, listening, c.adversarial.bound)
            loss = loss + scale * adversarial
            others |= {"g_loss": adversarial, "adversarial_scale": scale}
        q = c.quantizer
        loss = loss + terms["codebook"] + q.beta * terms["commitment"] - q.gamma * terms["entropy"]
        if self.alignment:
            others["align"], misaligned, made = self.align(images, terms["features"], t)
            loss, updates = loss + c.perceptual.align * misaligned, updates + made

        optimiser = self.optimisers["tokenizer"]
        gradients, clip = slopes(loss, w), self.s.clip
        updates.append(
            update("tokenizer", self.tokenizer, gradients, self.rate(t), optimiser, clip)
        )
        self.tokenizer = updates[-1].weights
        self.follow(t)
        logged = {name: terms[name] for name in ("commitment", "entropy")}
        logged |= {"l1": l1, "batch_usage": len(codes.unique()) / q.codes}
        return Step(detached(logged | perceptual | others), updates)

    def follow(self, t):
        """The mean of the weights over about a fraction `ema` of the steps so far."""
        window = self.c.tokenizer_training.ema
        if not window:
            return
        if self.mean is None:
            self.mean = self.tokenizer
        self.mean = {
            name: old + (self.tokenizer[name] - old) / (1 + window * t)
            for name, old in self.mean.items()
        }

    def validate(self, val, alpha, layers):
        """The numbers of the log on (at most 256) validation images."""
        images = to_numbers(val.images[:256])
        fake, codes, _ = self.reconstruct(images, self.mean or self.tokenizer)
        fake = fake.clamp(-1, 1)
        terms = {"l1": (fake - images).abs().mean(), **self.perceptual(fake, images, alpha, layers)}
        terms["loss"] = terms["l1"] + self.c.perceptual.weight * terms["perceptual"]
        terms["usage"] = len(codes.unique()) / self.c.quantizer.codes
        return {f"val_{name}": value for name, value in detached(terms).items()}

    def run(self, training, objective, val, before=None):
        """All steps, each with the `objective(t)`: alpha and layers of the perceptual loss."""
        for t in range(self.s.steps):
            if before is not None:
                before(t)
            training.steps.append(self.step(t, *objective(t)))
        training.final = {
            "tokenizer": self.mean or self.tokenizer,
            "discriminator": self.discriminator,
        }
        if val is not None:
            training.numbers = self.validate(val, *objective(self.s.steps - 1))
        return training


def train_tokenizer(c, train, val, features, start, anew=True, squares=None):
    """Phase one; `anew` makes the codebook of the start features of the first images."""
    fit = TokenizerTraining(c, c.tokenizer_training, train, features, start, squares)
    q = c.quantizer
    positions = (c.data.size // 2 ** (len(c.autoencoder.multipliers) - 1)) ** 2

    @torch.no_grad()
    def encoded(count, t=0):
        """At least `count` features, of the batches before step t, or of the first ones."""
        batches = math.ceil(count / (c.tokenizer_training.batch * positions))
        first = max(0, t - batches)
        steps = range(first, max(t, first + batches))
        own = under(fit.tokenizer, "encoder")
        z = torch.cat([encode(fit.batch(i), own, c.autoencoder) for i in steps])
        return compared(z, under(fit.tokenizer, "quantizer"), q).flatten(0, 2)

    def reestimate(t):
        if q.kmeans_every and 0 < t <= q.kmeans_last and t % q.kmeans_every == 0:
            own = under(fit.tokenizer, "quantizer")
            codes = lloyd(encoded(q.kmeans_buffer, t), own, q, c.seed)
            fit.tokenizer = fit.tokenizer | {"quantizer.codebook": codes}

    def objective(t):
        p = c.perceptual
        return (0.0, ()) if t < p.warmup else (p.alpha, p.layers)

    if anew and q.start == "data":
        codes = first_codes(encoded(4 * q.codes), q.codes, c.seed)
        fit.tokenizer = fit.tokenizer | {"quantizer.codebook": codes}
    training = Training(start | {"tokenizer": fit.tokenizer})
    return fit.run(training, objective, val, reestimate)


def train_decoder(c, train, val, features, start):
    """Phase two: the decoder alone, for details; the discriminator goes on from the start."""
    p = c.second_phase
    fit = TokenizerTraining(c, p, train, features, start)
    fit.beginnings, fit.pairs = (0, 0, 0), p.attention
    fit.trained = [name for name in fit.tokenizer if name.startswith("decoder.")]
    return fit.run(Training(start), lambda t: (p.alpha, ()), val)


def train_transformer(c, train, val, start):
    """AR or NAR, on codes (M, N) with labels (M,)."""
    s, seed = c.transformer_training, c.seed
    weights, training = start["transformer"], Training(start)
    decaying = [n for n, w in weights.items() if w.ndim == 2 and "embedding" not in n]
    if s.weight_decay_on == "all":
        decaying = list(weights)
    optimiser = Adam(s.betas, s.weight_decay, decaying)

    def predicted(batch, *seed):
        n = train.codes.shape[1]
        if c.transformer.causal:
            return torch.ones(batch, n, dtype=torch.bool)
        return hidden_codes(batch, n, *seed)

    for t in range(s.steps):
        rows = torch.randint(len(train.codes), (s.batch,), generator=generator("rows", seed, t))
        w = leaves(weights)
        dropout = Dropout(c.transformer.dropout, generator("step", seed, t, 0))
        batch = train.codes[rows], train.labels[rows], predicted(s.batch, seed, t)
        terms = code_terms(*batch, w, c, dropout)
        rate = transformer_rate(t, s)
        made = update("transformer", weights, slopes(terms["loss"], w), rate, optimiser, s.clip)
        weights = made.weights
        training.steps.append(Step(detached(terms), [made]))

    sums, count = {}, len(val.codes)
    for i, first in enumerate(range(0, count, 64)):
        codes, labels = val.codes[first : first + 64], val.labels[first : first + 64]
        mask = predicted(len(codes), "validation", i)
        terms = code_terms(codes, labels, mask, weights, c, Dropout())
        for name, value in detached(terms).items():
            sums[name] = sums.get(name, 0.0) + len(codes) * value / count
    training.numbers = {f"val_{name}": value for name, value in sums.items()}
    training.final = {"transformer": weights}
    return training
