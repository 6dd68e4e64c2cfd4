"""The operations and habits that generated nets are built from: each block writes a few lines of a ``Program``.

A block takes ``x`` (N, C, H, W) and leaves one, of any size that is not too small for the next.
"""

from __future__ import annotations

from collections.abc import Callable

from generated_nets import PLACES, Program

# A kind, what makes a module of it, and ways to write it as a function of {x}.
RELU = ("relu", ("nn.ReLU()",), (
    "F.relu({x})", "torch.relu({x})", "{x}.relu()", "{x}.clamp(min=0)", "torch.clamp({x}, min=0)", "{x}.clamp_min(0)",
    "F.threshold({x}, 0, 0)", "torch.maximum({x}, torch.zeros_like({x}))", "{x} * ({x} > 0)",
    "torch.where({x} > 0, {x}, 0)", "F.relu(input={x})",
))  # fmt: skip
RELU6 = ("relu6", ("nn.ReLU6()", "nn.Hardtanh(0, 6)"), ("F.relu6({x})", "{x}.clamp(0, 6)", "F.hardtanh({x}, 0.0, 6.0)"))
SMOOTH = (
    ("leaky", ("nn.LeakyReLU(0.1)", "nn.RReLU()"), ("F.leaky_relu({x}, 0.1)", "torch.maximum({x}, 0.1 * {x})")),
    ("elu", ("nn.ELU()", "nn.SELU()", "nn.CELU(0.5)"), ("F.elu({x})", "F.selu({x})", "F.celu({x}, 0.5)")),
    ("gelu", ("nn.GELU()", "nn.GELU('tanh')"), ("F.gelu({x})", "F.gelu({x}, approximate='tanh')")),
    ("silu", ("nn.SiLU()", "nn.Mish()"), ("F.silu({x})", "F.mish({x})", "{x} * torch.sigmoid({x})")),
    ("soft", ("nn.Softplus()", "nn.Softplus(2.0)", "nn.Softsign()"), ("F.softplus({x})", "F.softsign({x})")),
    ("hard", ("nn.Hardswish()", "nn.Hardsigmoid()", "nn.Hardtanh()"), ("F.hardswish({x})", "F.hardsigmoid({x})")),
    ("tanh", ("nn.Tanh()", "nn.Sigmoid()", "nn.LogSigmoid()"), ("torch.tanh({x})", "{x}.sigmoid()", "{x}.tanh()")),
    ("shrink", ("nn.Tanhshrink()", "nn.Softshrink(0.2)", "nn.Hardshrink(0.2)"), ("F.softshrink({x}, 0.2)",)),
    ("clamp", ("nn.Threshold(0.1, -0.2)",), ("{x}.clamp(-1, 1)", "torch.minimum({x}, torch.ones_like({x}))")),
    ("square", (), ("{x} ** 2", "{x} * {x}", "torch.square({x})", "{x}.pow(3)")),
    ("abs", (), ("{x}.abs()", "torch.abs({x})", "(1 + {x} ** 2).sqrt()", "torch.log1p({x}.abs())")),
    ("wave", (), ("torch.sin({x})", "torch.exp(-{x}.abs())", "torch.atan({x})", "torch.erf({x})")),
)  # fmt: skip


def activation(p: Program, of: str = "x", fresh: bool = False) -> None:
    """``of = f(of)`` in one of many forms; ``fresh`` says that nothing else needs the value that ``of`` had."""
    choices = p.choices
    kind, modules, functions = (
        RELU if choices.chance(0.55) else RELU6 if choices.chance(0.1) else choices.one(SMOOTH)
    )  # fmt: skip
    if kind in ("relu", "relu6"):
        p.features.add("relu")
    how = choices.integer(0, 3)
    if kind == "relu" and how == 0 and fresh:
        code = choices.one(("F.relu({x}, inplace=True)", "F.relu_({x})", "torch.relu_({x})", "self.relu_in({x})"))
        if "self.relu_in" in code and not any("relu_in" in line for line in p.init):
            p.define("self.relu_in = nn.ReLU(inplace=True)")
        p.line(f"{of} = {code.format(x=of)}", f"{of} = each('relu', torch.relu, {of})")
        return
    if kind == "relu" and how == 1:  # one module for all ReLUs, under two names perhaps
        if not any("self.relu " in line for line in p.init):
            p.define("self.relu = nn.ReLU()")
            if choices.chance(0.3):
                p.define("self.also_relu = self.relu")
        name = choices.one([line.split()[0] for line in p.init if "relu = " in line])
        p.line(f"{of} = {name}({of})", f"{of} = each('relu', torch.relu, {of})")
        return
    if modules and how != 2:
        expression = choices.one(modules)
        if expression == "nn.LeakyReLU(0.1)" and choices.chance(0.4):
            expression = choices.one(("nn.PReLU()", f"nn.PReLU({p.size[0]})" if of == "x" else "nn.PReLU()"))
        path = p.module("act", expression)
        p.line(f"{of} = self.{path}({of})", f"{of} = each('{kind}', self.{path}, {of})")
        return
    code = choices.one(functions)
    p.line(f"{of} = {code.format(x=of)}", f"{of} = each('{kind}', lambda t: {code.format(x='t')}, {of})")


def convolution(p: Program, out: int | None = None, keep: bool = False) -> str:
    """``x = conv(x)``; with ``keep`` of the same height and width. Returns the module's path."""
    choices, (c, h, w) = p.choices, p.size
    out = out or choices.one((2, 4, 4, 6))
    more = "" if choices.chance(0.8) else ", bias=False"
    groups = choices.one([g for g in (1, 1, 1, 2, c) if c % g == 0 and out % g == 0])
    more += f", groups={groups}" if groups > 1 else ""
    mode = choices.one(("", "", "", "", ", padding_mode='reflect'", ", padding_mode='circular'"))
    size, padding = choices.one(((3, 1), (3, 1), (1, 0), (5, 2), ((3, 1), (1, 0)), (3, "'same'")))
    if keep or min(h, w) < 6:
        pass
    elif (how := choices.integer(0, 5)) == 0:
        more += ", stride=2" if padding != "'same'" else ""
    elif how == 1 and size == 3:
        more, padding = more + ", dilation=2", choices.one((1, 2))
    elif how == 2:
        padding = choices.one((0, 0, padding))
    path = p.module("conv", f"nn.Conv2d({c}, {out}, {size}, padding={padding}{more}{mode})")
    p.line(f"x = self.{path}(x)")
    p.place(path)
    return path


def norm(p: Program) -> None:
    choices, (c, h, w) = p.choices, p.size
    if choices.chance(0.5):  # linear when evaluated
        kind = choices.one(("nn.BatchNorm2d({c})",) * 4 + ("nn.InstanceNorm2d({c}, track_running_stats=True)",))
        path = p.module("norm", kind.format(c=c))
        p.line(f"x = self.{path}(x)")
        p.place(path)
        return
    p.features.add("product")
    kind = choices.one((
        "nn.GroupNorm(1, {c})", "nn.GroupNorm({c}, {c})", "nn.InstanceNorm2d({c}, affine=True)",
        "nn.LocalResponseNorm(3)",
        "nn.LayerNorm([{c}, {h}, {w}])", "last nn.LayerNorm({c})", "last nn.RMSNorm({c})", "F.normalize(x, dim=1)",
        "F.layer_norm(x, x.shape[1:])", "x / (x.square().mean(1, keepdim=True) + 0.1).sqrt()",
    )).format(c=c, h=h, w=w)  # fmt: skip
    if kind.startswith("last "):
        path = p.module("norm", kind.removeprefix("last "))
        p.line("x = x.permute(0, 2, 3, 1)")
        p.line(f"x = self.{path}(x)")
        p.line("x = x.permute(0, 3, 1, 2)" + p.choices.one(("", ".contiguous()")))
        p.place(path, "channels_last")
    elif kind.startswith("nn."):
        path = p.module("norm", kind)
        p.line(f"x = self.{path}(x)")
        p.place(path)
    else:
        p.line(f"x = {kind}")


def plain_block(p: Program) -> None:
    convolution(p)
    if p.choices.chance(0.5):
        norm(p)
    activation(p, fresh=True)


def sequential(p: Program) -> None:
    """A container that is called as a whole."""
    c = p.size[0]
    p.features.add("relu")
    out = p.choices.one((2, 4))
    inplace = p.choices.one(("", "inplace=True"))
    path = p.module(
        "body", f"nn.Sequential(nn.Conv2d({c}, {out}, 3, padding=1), nn.BatchNorm2d({out}), nn.ReLU({inplace}))"
    )
    p.line(f"x = self.{path}(x)", [f"x = self.{path}[1](self.{path}[0](x))", "x = each('relu', torch.relu, x)"])
    p.place(path)
    p.places[f"{path}.0"] = p.places[path]


def residual(p: Program) -> None:
    c = p.size[0]
    p.line("y = x")
    convolution(p, keep=True)
    if p.choices.chance(0.6):
        norm(p)
    activation(p, fresh=True)
    convolution(p, out=c, keep=True)
    scale = p.choices.one(("", "", "", " * self.scale"))
    if scale:
        path = p.name("scale")
        p.define(f"self.{path} = nn.Parameter(torch.full((1, {c}, 1, 1), 0.5))")
        scale = f" * self.{path}"
    add, rule = p.choices.one((
        ("x = x{s} + y", None), ("x = y + x{s}", None), ("x = torch.add(x{s}, y)", None), ("x += y", "x = x + y"),
        ("x = x.add_(y)", "x = x + y"),
    ))  # fmt: skip
    if rule is None or not scale:
        p.line(add.format(s=scale), rule)
    else:
        p.line(f"x = x{scale} + y")
    if p.choices.chance(0.6):
        activation(p, fresh=True)


def pool(p: Program) -> None:
    if min(p.size[1:]) < 4:
        return plain_block(p)
    largest = p.choices.chance(0.5)
    if largest:
        p.features.add("max")
        kinds = (
            "nn.MaxPool2d(2)", "nn.MaxPool2d(3, 2, 1)", "nn.MaxPool2d(2, ceil_mode=True)", "nn.MaxPool2d(3, 1)",
            "nn.MaxPool2d((2, 3), (2, 1), (1, 0))", "nn.MaxPool2d(2, 2, dilation=2)",
            "nn.MaxPool2d(3, 2, ceil_mode=True)",
            "F.max_pool2d(x, 2)", "F.max_pool2d(x, 3, stride=2, padding=1)", "torch.max_pool2d(x, 2)",
            "nn.AdaptiveMaxPool2d((4, 3))", "F.adaptive_max_pool2d(x, 4)", "F.max_pool2d(x, kernel_size=2)",
        )  # fmt: skip
    else:
        kinds = (
            "nn.AvgPool2d(2)", "nn.AvgPool2d(3, 2, 1)", "nn.AvgPool2d(3, 1, 1, count_include_pad=False)",
            "nn.AvgPool2d(3, 2, ceil_mode=True)", "nn.AdaptiveAvgPool2d((4, 5))", "F.avg_pool2d(x, 2)",
            "x[..., ::2, 1:]",
            "F.adaptive_avg_pool2d(x, (None, 4))", "nn.LPPool2d(2, 2)", "F.pixel_unshuffle(x[..., :4, :4], 2)",
        )  # fmt: skip
    kind = p.choices.one(kinds)
    if "LPPool" in kind:  # of what is never zero, where its gradient is not defined
        p.features.add("product")
        p.line("x = F.softplus(x) + 0.1", "x = each('soft', lambda t: F.softplus(t) + 0.1, x)")
    if kind.startswith("nn."):
        path = p.module("pool", kind)
        p.line(f"x = self.{path}(x)")
        p.place(path)
    else:
        p.line(f"x = {kind}")


def enlarge(p: Program) -> None:
    c, h, w = p.size
    if max(h, w) * 2 > PLACES:
        return pool(p)
    kinds = ["nn.ConvTranspose2d({c}, 4, 3, stride=2, padding=1)", "nn.Upsample(scale_factor=2)",
             "F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)", "F.interpolate(x, size=(9, 11))",
             "nn.Upsample(scale_factor=1.5, mode='bilinear')", "F.pad(x, (1, 2, 0, 1))", "nn.ZeroPad2d(1)",
             "F.pad(x, (1, 1, 1, 1), mode='reflect')", "nn.ReflectionPad2d(1)"]  # fmt: skip
    if c % 4 == 0:
        kinds += ["nn.PixelShuffle(2)", "F.pixel_shuffle(x, 2)"]
    kind = p.choices.one(kinds).format(c=c)
    if kind.startswith("nn."):
        path = p.module("up", kind)
        p.line(f"x = self.{path}(x)")
        if "Conv" in kind:
            p.place(path)
    else:
        p.line(f"x = {kind}")


def channels_last(p: Program) -> None:
    """ConvNeXt's block: the channels are mixed by linear layers of (N, H, W, C)."""
    c = p.size[0]
    p.features.add("product")
    p.line("y = x")
    p.line(p.choices.one(("x = x.permute(0, 2, 3, 1)", "x = x.movedim(1, -1)")))
    path = p.module("norm", f"nn.LayerNorm({c})")
    p.line(f"x = self.{path}(x)")
    wide = p.module("wide", f"nn.Linear({c}, {2 * c})")
    p.line(f"x = self.{wide}(x)")
    activation(p, fresh=True) if p.choices.chance(0.5) else p.line("x = F.gelu(x)", "x = each('gelu', F.gelu, x)")
    narrow = p.module("narrow", f"nn.Linear({2 * c}, {c})")
    p.line(f"x = self.{narrow}(x)")
    p.line("x = y + x.permute(0, 3, 1, 2)")
    for layer in (path, wide, narrow):
        p.place(layer, "channels_last")


def attention(p: Program) -> None:
    """Over the places as tokens, with a class token in front perhaps."""
    c, h, w = p.size
    if h * w > 64:
        p.line("x = F.avg_pool2d(x, 2)")
        c, h, w = p.size
    p.features.add("product")
    if c % 2:
        convolution(p, out=4, keep=True)
        c = 4
    prefix = int(p.choices.chance(0.3))
    p.line("t = x.flatten(2).transpose(1, 2)")
    if prefix:
        path = p.name("token")
        p.define(f"self.{path} = nn.Parameter(torch.zeros(1, 1, {c}))")
        p.line(f"t = torch.cat((self.{path}.expand(x.shape[0], -1, -1), t), 1)")
    how = p.choices.integer(0, 3)
    if how == 0:
        path = p.module("attn", f"nn.MultiheadAttention({c}, 2, batch_first=True)")
        p.line(f"t = t + self.{path}(t, t, t, need_weights=False)[0]")
    elif how == 1:
        path = p.module("encoder", f"nn.TransformerEncoderLayer({c}, 2, {c + 2}, batch_first=True, activation='gelu')")
        p.line(f"t = self.{path}(t)")
        p.place(path, "tokens", prefix)
    else:
        path = p.module("qkv", f"nn.Linear({c}, {3 * c})")
        p.line(f"q, k, v = self.{path}(t).chunk(3, -1)")
        p.place(path, "tokens", prefix)
        if how == 2:
            p.line("t = t + F.scaled_dot_product_attention(q, k, v)")
        else:
            p.line(f"t = t + (q @ k.transpose(-2, -1) / math.sqrt({c})).softmax(-1) @ v")
    path = p.module("norm", f"nn.LayerNorm({c})")
    p.line(f"t = self.{path}(t)")
    p.place(path, "tokens", prefix)
    p.line(f"x = t[:, {prefix}:].transpose(1, 2).reshape(-1, {c}, {h}, {w})")


def squeeze(p: Program) -> None:
    """Squeeze and excitation."""
    c = p.size[0]
    p.features |= {"product", "relu"}
    p.line(p.choices.one(("s = x.mean((2, 3), keepdim=True)", "s = F.adaptive_avg_pool2d(x, 1)")))
    one, two = p.module("down", f"nn.Conv2d({c}, 2, 1)"), p.module("up", f"nn.Conv2d(2, {c}, 1)")
    p.line(f"s = self.{two}(F.relu(self.{one}(s)))", f"s = self.{two}(each('relu', torch.relu, self.{one}(s)))")
    p.line("x = x * torch.sigmoid(s)", "x = x * each('tanh', torch.sigmoid, s)")


def gate(p: Program) -> None:
    convolution(p, out=4, keep=True)
    p.features.add("product")
    p.line(p.choices.one(("a, b = x.chunk(2, 1)", "a, b = torch.split(x, 2, 1)", "a, b = x[:, :2], x[:, 2:]")))
    code, rule = p.choices.one((
        ("x = a * torch.sigmoid(b)", "x = a * each('tanh', torch.sigmoid, b)"), ("x = F.glu(x, 1)", None),
        ("x = a * b.tanh()", "x = a * each('tanh', torch.tanh, b)"), ("x = a * b", None),
        ("x = torch.mul(a, F.relu(b))", "x = a * each('relu', torch.relu, b)"),
    ))  # fmt: skip
    if "relu" in code:
        p.features.add("relu")
    p.line(code, rule)


def branches(p: Program) -> None:
    """Two ways side by side, and their outputs one behind the other."""
    p.line("y = x")
    convolution(p, out=2, keep=True)
    activation(p, fresh=True)
    p.line("z, x = x, y")
    convolution(p, out=2, keep=True)
    p.line(p.choices.one((
        "x = torch.cat((z, x), 1)", "x = torch.cat([x, z, y], dim=1)", "x = torch.cat((x, -x, z), 1)",
        "x = torch.stack((x, z), 1).flatten(1, 2)", "x = x - 0.5 * z", "x = torch.hstack((x, z))",
        "x = torch.concat((z, x), axis=1)",
    )))  # fmt: skip


def again(p: Program) -> None:
    """A layer that runs twice."""
    c = p.size[0]
    path = p.module("twice", f"nn.Conv2d({c}, {c}, 3, padding=1)")
    p.line(f"x = self.{path}(x)")
    activation(p, fresh=True)
    p.line(f"x = self.{path}(x)")
    p.again.add(path)


def views(p: Program) -> None:
    """In-place operations through views, behind a layer that does not need what it has given."""
    convolution(p, out=4, keep=True)
    if not p.contiguous:
        p.line("x = x.contiguous()")
    code = p.choices.one((
        ("F.relu(x[:, :2], inplace=True)", "x = torch.cat((each('relu', torch.relu, x[:, :2]), x[:, 2:]), 1)"),
        ("x[:, 1:3].relu_()",
         "x = torch.cat((x[:, :1], each('relu', torch.relu, x[:, 1:3]), x[:, 3:]), 1)"),
        ("x.view(x.size(0), -1).mul_(0.5)", "x = x * 0.5"),
        ("x[:, :1] *= 2", "x = torch.cat((x[:, :1] * 2, x[:, 1:]), 1)"),
        ("x[:, 0] = x[:, 1]", "x = torch.cat((x[:, 1:2], x[:, 1:]), 1)"),
        ("x.flatten(2)[..., :7].zero_()",
         "x = (x.flatten(2) * (torch.arange(x[0, 0].numel()) >= 7)).view(x.shape)"),
        ("x.transpose(2, 3)[:, :, 0].clamp_(min=0)",
         "x = torch.cat((each('relu', torch.relu, x[..., :1]), x[..., 1:]), 3)"),
        ("x += 0.5", "x = x + 0.5"),
    ))  # fmt: skip
    if "relu" in code[1]:
        p.features.add("relu")
    p.line(*code)


def moves(p: Program) -> None:
    """Places and channels move; nothing else changes."""
    c, h, w = p.size
    halves = f"x.reshape(-1, 2, {c // 2}, {h}, {w}).transpose(1, 2).reshape(-1, {c}, {h}, {w})"
    p.line(p.choices.one((
        "x = x.flip(3)", "x = x.roll(1, 2)", "x = torch.roll(x, (1, 2), (2, 3))", "x = x.transpose(2, 3)",
        "x = x[:, :, 1:]", "x = x.narrow(3, 1, x.size(3) - 2)", "x = x.unflatten(1, (-1, 1)).squeeze(2)",
        f"x = {halves}" if c % 2 == 0 else "x = x[:, torch.arange(x.size(1)).flip(0)]",
        "x = x.clone()", "x = x.contiguous()",
    )))  # fmt: skip


def arithmetic(p: Program) -> None:
    p.line(p.choices.one((
        "x = x * 0.5 + 0.1", "x = (x - 0.2) / 1.5", "x = 1 - x", "x = -x", "x = x.mul(1.2).sub(0.1)",
        "x = torch.add(x, 0.3, alpha=2)", "x = x.div(2)", "x = x - 0.5 * x.mean((2, 3), keepdim=True)",
    )))  # fmt: skip


def dropout(p: Program) -> None:
    if p.choices.chance(0.12):
        p.features.add("random")
        p.line(p.choices.one(("x = F.dropout(x, 0.3)", "x = x + 0.1 * torch.randn_like(x)", "x = F.dropout2d(x, 0.3)")))
    else:
        path = p.module("drop", p.choices.one(("nn.Dropout(0.3)", "nn.Dropout2d(0.3)", "nn.AlphaDropout(0.2)")))
        p.line(p.choices.one((f"x = self.{path}(x)", "x = F.dropout(x, 0.3, self.training)")))


def rows_interact(p: Program) -> None:
    """Statistics of the batch: no number of a sample is its own."""
    if not p.choices.chance(0.3):
        return plain_block(p)
    p.features |= {"batch", "product"}
    c = p.size[0]
    path = p.module("norm", f"nn.BatchNorm2d({c}, track_running_stats=False)")
    p.line(p.choices.one((f"x = self.{path}(x)", f"x = self.{path}(x)", "x = x - x.mean(0, keepdim=True)")))


def python(p: Program) -> None:
    """Python that looks at shapes and rows, which a trace cannot follow."""
    if not p.choices.chance(0.25):
        return plain_block(p)
    p.features.add("untraced")
    p.line(p.choices.one(("x = torch.stack([row * 0.5 for row in x])", "x = x[:, :4] if x.shape[1] > 4 else x")))


BLOCKS: tuple[tuple[int, Callable[[Program], None]], ...] = (
    (4, plain_block), (4, residual), (4, pool), (2, sequential), (2, branches), (2, views), (2, channels_last),
    (2, attention), (2, gate), (2, squeeze), (2, enlarge), (2, moves), (1, again), (1, arithmetic), (1, dropout),
    (1, rows_interact), (1, python),
)  # fmt: skip


def stem(p: Program) -> None:
    c = p.size[0]
    if p.choices.chance(0.2):
        p.define(f"self.register_buffer('mean', torch.full((1, {c}, 1, 1), 0.2))")
        p.line("x = (x - self.mean) / 1.1")
    elif p.choices.chance(0.15):  # a net that writes into what it is given
        p.line(*p.choices.one((("x.mul_(1.1)", "x = x * 1.1"), ("x += 0.1", "x = x + 0.1"))))
    convolution(p, out=4)
    if p.choices.chance(0.5):
        norm(p)
    activation(p, fresh=True)


def head(p: Program, classes: int) -> None:
    choices, (c, h, w) = p.choices, p.size
    how = choices.integer(0, 9)
    if how == 0 and h > 1:
        p.features |= {"product", "recurrent"}
        kind = choices.one(("LSTM", "GRU"))
        path = p.module("rows", f"nn.{kind}({c * w}, 5, batch_first=True)")
        p.line("x = x.permute(0, 2, 1, 3).flatten(2)")
        p.line(f"x, _ = self.{path}(x)")
        p.line(choices.one(("x = x[:, -1]", "x = x.mean(1)")))
        size = 5
    elif how == 1:
        path = p.module("last", f"nn.Conv2d({c}, {classes}, 1)")
        p.line(f"x = self.{path}(x)")
        p.place(path)
        p.line("x = x.mean((2, 3))")
        return
    elif how == 2:
        p.features.add("max")
        p.line(choices.one((
            "x = x.amax((2, 3))", "x = F.adaptive_max_pool2d(x, 1).flatten(1)", "x = x.flatten(2).max(-1).values",
            "x = torch.max(x.flatten(2), 2)[0]",
        )))  # fmt: skip
        size = c
    elif how == 3:  # attention pooling
        p.features.add("product")
        path = p.module("weight", f"nn.Conv2d({c}, 1, 1)")
        p.line(f"a = self.{path}(x).flatten(2).softmax(-1)")
        p.line("x = (x.flatten(2) * a).sum(-1)")
        size = c
    elif how < 7:
        p.line(choices.one((
            "x = x.mean((2, 3))", "x = x.mean(dim=[-2, -1])", "x = F.adaptive_avg_pool2d(x, 1).flatten(1)",
            "x = F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)", "x = x.flatten(2).mean(-1)",
            "x = torch.einsum('nchw->nc', x) / 10",
        )))  # fmt: skip
        size = c
    else:
        p.line(choices.one((
            "x = x.flatten(1)", "x = torch.flatten(x, 1)", "x = x.contiguous().view(x.size(0), -1)",
            "x = x.reshape(x.shape[0], -1)", "x = nn.Flatten()(x)",
        )))  # fmt: skip
        size = c * h * w
    if choices.chance(0.4):
        path = p.module("hidden", f"nn.Linear({size}, 6)")
        p.line(f"x = self.{path}(x)")
        code = choices.one(("F.relu(x)", "x.clamp(min=0)", "torch.tanh(x)", "F.gelu(x)"))
        if "relu" in code or "clamp" in code:
            p.features.add("relu")
            p.line(f"x = {code}", "x = each('relu', torch.relu, x)")
        else:
            p.line(f"x = {code}", f"x = each('tanh', lambda t: {code.replace('(x)', '(t)')}, x)")
        size = 6
    path = p.module("head", f"nn.Linear({size}, {classes})")
    p.line(f"x = self.{path}(x)")
    if choices.chance(0.05):
        p.features.add("product")
        p.line("x = F.log_softmax(x, 1)")


def write(p: Program, classes: int) -> None:
    stem(p)
    blocks = [block for weight, block in BLOCKS for _ in range(weight)]
    for _ in range(p.choices.integer(1, 3)):
        p.choices.one(blocks)(p)
    head(p, classes)
