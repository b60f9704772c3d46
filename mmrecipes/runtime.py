"""One checkpoint in ONNX Runtime: an Idefics3-class VLM as two graphs, int8 with or without calibration, and back into the model.

Notebook 11 uses it. The graphs are `vision.onnx` (pixels to visual tokens, connector included) and `language.onnx` (embeddings
to last hidden states, without a KV cache); word embeddings, the head and `generate` stay in PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError, one_line
from mmrecipes.exported import session_options

PARTS = ("vision", "language")
MOST = 1_900_000_000  # bytes of weights: one ONNX file holds at most 2 GB


class Vision(nn.Module):
    """pixel_values (N, 3, H, W), whole pictures of the model's own size -> visual tokens (N, T, D), connector included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        size = self.tower.config.image_size
        n, blank = size // self.tower.patch_size, torch.zeros(1, 3, size, size)
        with torch.no_grad():  # positions depend on which patches are real; here all are, so they are constants
            self.positions = nn.Buffer(self.tower.embeddings(blank, torch.ones(1, n, n, dtype=torch.bool)) - self.patches(blank))

    def patches(self, pixel_values: Tensor) -> Tensor:
        return self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        flowing = self.patches(pixel_values) + self.positions
        flowing = self.tower.encoder(inputs_embeds=flowing, attention_mask=None).last_hidden_state
        return self.connector(self.tower.post_layernorm(flowing))


class Language(nn.Module):
    """inputs_embeds (B, T, D) and attention_mask (B, T), 1 for real tokens -> last hidden states (B, T, D) after the norm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.decoder = model.model.text_model

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at 0, however much padding precedes it
        at = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        seen = (at[None, :] <= at[:, None])[None, None] & (attention_mask[:, None, None, :] > 0)
        # finite, not -inf: a padding token sees nobody, and its row must not become NaN
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return self.decoder(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state


# ---- export


def export(model: nn.Module, folder: str | Path) -> dict[str, Path]:
    """`vision.onnx` and `language.onnx` of a float32 Idefics3-class VLM (SmolVLM, `mini-vlm`) in `folder`, both or neither.

    Batch and text length are free; pictures are whole and of the model's own size. Raises UserError for another architecture,
    another dtype, or weights that one file cannot hold; ImportError where onnx or onnxscript is missing.
    """
    core = getattr(model, "model", None)
    if not all(hasattr(core, n) for n in ("vision_model", "connector", "text_model")) or not hasattr(
        core.vision_model, "post_layernorm"
    ):
        raise UserError(f"export: {type(model).__name__} is not built like Idefics3; export its parts with runtime.to_onnx")
    _float32(model)
    modules = {"vision": Vision(model), "language": Language(model)}
    size, width = core.vision_model.config.image_size, core.text_model.config.hidden_size
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :3] = 0
    examples = {
        "vision": {"pixel_values": torch.randn(2, 3, size, size)},
        "language": {"inputs_embeds": torch.randn(2, 12, width), "attention_mask": mask},
    }
    free = {"pixel_values": {0: "batch"}} | {k: {0: "batch", 1: "tokens"} for k in ("inputs_embeds", "attention_mask")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
        written = {part: to_onnx(modules[part], examples[part], Path(aside) / f"{part}.onnx", free) for part in PARTS}
        return {part: path.replace(folder / path.name) for part, path in written.items()}


def to_onnx(module: nn.Module, inputs: Mapping[str, Tensor], path: str | Path, free: Mapping[str, Mapping[int, str]]) -> Path:
    """One module as one ONNX file at `path`, by torch.export. `inputs` are an example, by the names of forward's parameters.

    `free` names the axes whose length may change, {"pixel_values": {0: "batch"}}; give them a length of 2 or more in the
    example. Attention without a mask becomes ONNX Runtime's fused MultiHeadAttention. Raises as `export`.
    """
    needs("onnx", "onnxscript")
    _float32(module)
    if (size := sum(t.nbytes for t in (*module.parameters(), *module.buffers()))) > MOST:
        raise UserError(f"export: {size / 1e9:.1f} GB of weights do not fit in one ONNX file of 2 GB; export a smaller part")
    dims = {name: torch.export.Dim(name, min=1) for axes in free.values() for name in axes.values()}
    shapes = {k: {axis: dims[name] for axis, name in free.get(k, {}).items()} for k in inputs}
    with quiet(), written(path) as aside, torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=["output"],
            dynamo=True,
            verbose=False,
            opset_version=20,
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention()},
        )
        program.save(aside, external_data=False)
    return Path(path)


def _float32(module: nn.Module) -> None:
    wrong = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if wrong:
        raise UserError(f"export: the weights are {wrong}; it starts from float32, so load the model with dtype=torch.float32")


def _attention() -> Callable:
    """How scaled_dot_product_attention is written in ONNX: one MultiHeadAttention node of ONNX Runtime's own.

    Written out in MatMul and Softmax it would store all scores of a picture, and take half as long again.
    """
    from onnx.defs import OpSchema
    from onnxscript import opset20 as op
    from onnxscript.values import Op, Opset

    kind, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    names = ("key", "value", "bias", "key_padding_mask", "attention_bias")
    schema = OpSchema(
        *("MultiHeadAttention", "com.microsoft", 1),
        inputs=[kind("query", "T"), *(kind(n, "M" if n == "key_padding_mask" else "T", param_option=optional) for n in names)],
        outputs=[kind("output", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[OpSchema.Attribute("num_heads", OpSchema.AttrType.INT), OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT)],
    )
    fused = Op(Opset("com.microsoft", 1), "MultiHeadAttention", schema)

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        heads, width = query.shape[1], query.shape[3]

        def flat(x):  # (B, heads, T, width) -> (B, T, heads * width)
            return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

        found = fused(flat(query), flat(key), flat(value), None, None, attn_mask, num_heads=heads, scale=scale or width**-0.5)
        return op.Transpose(op.Reshape(found, op.Constant(value_ints=[0, 0, heads, -1])), perm=[0, 2, 1, 3])

    return attend


# ---- int8


def dynamic_int8(
    graph: str | Path, out: str | Path, weights: str = "uint8", reduce_range: bool = False, keep: Sequence[str] = ()
) -> Path:
    """A copy of `graph` at `out` with int8 matrix products: weights ahead, one scale a channel, activations on the fly.

    Activations are 8 bits unsigned, one scale a tensor. Weights: "uint8" is exact everywhere; "int8" is quicker with VNNI, but
    without it (AVX2) its products saturate, unless `reduce_range` leaves the weights 7 bits. After ONNX Runtime's page
    "Quantize ONNX models". Products of two activations (attention) stay in float32, and so do the layers of which a name in
    `keep` is part, say ("down_proj",): the way out where a few activations are far larger than the rest.
    """
    needs("onnxruntime", "onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kind = _kind(weights)
    with prepared(graph) as ready, quiet(), written(out) as aside:
        quantize_dynamic(
            ready,
            aside,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType[kind],
            nodes_to_exclude=nodes(graph, keep),
        )
    return Path(out)


def static_int8(
    graph: str | Path,
    feeds: Sequence[Mapping[str, np.ndarray]],
    out: str | Path,
    method: str = "MinMax",
    reduce_range: bool = True,
    keep: Sequence[str] = (),
) -> Path:
    """A copy of `graph` at `out` with int8 matrix products whose activation ranges were fixed on `feeds` beforehand.

    QuantizeLinear and DequantizeLinear pairs (QDQ); weights symmetric int8, one scale a channel, of 7 bits with `reduce_range`
    (see `dynamic_int8`, also for `keep`); activations uint8, one range a tensor. `feeds` are the graph's inputs by name, one
    entry a batch, all of one shape except for MinMax; `method` is MinMax, Entropy, Percentile or Distribution.
    """
    needs("onnxruntime", "onnx")
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    if not feeds:
        raise UserError("static_int8: no calibration feeds; give some of the graph's inputs, or use dynamic_int8")
    if method not in CalibrationMethod.__members__:
        raise UserError(f"static_int8: method={method!r}; expected one of {', '.join(CalibrationMethod.__members__)}")

    class Reader(CalibrationDataReader):
        rest = iter(feeds)

        def get_next(self):
            return next(self.rest, None)

    with prepared(graph) as ready, quiet(), written(out) as aside:
        quantize_static(
            ready,
            aside,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            nodes_to_exclude=nodes(graph, keep),
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
    return Path(out)


def nodes(graph: str | Path, keep: Sequence[str]) -> list[str]:
    """Names of the graph's nodes that come from modules of which a name in `keep` is part; the exporter noted the modules."""
    if not keep:
        return []
    found = scopes(graph)
    if missing := [k for k in keep if not any(k in scope for scope in found.values())]:
        raise UserError(f"keep={missing[0]!r}: {graph} has no module of that name; leave it out")
    return [name for name, scope in found.items() if any(k in scope for k in keep)]


def scopes(graph: str | Path) -> dict[str, str]:
    """The module that each node of `graph` came from, where the exporter noted it: {name of the node: path of the module}."""
    import onnx

    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    return {n.name: p.value for n in nodes for p in n.metadata_props if p.key.endswith("name_scopes")}


def _kind(weights: str) -> str:
    kinds = {"uint8": "QUInt8", "int8": "QInt8"}
    if weights not in kinds:
        raise UserError(f"dynamic_int8: weights={weights!r}; expected one of {', '.join(kinds)}")
    return kinds[weights]


# ---- run


def session(graph: str | Path):  # -> onnxruntime.InferenceSession
    """`graph` ready to run on the CPU, with as many threads as PyTorch uses; UserError where there is no such file."""
    needs("onnxruntime")
    import onnxruntime as ort

    if not Path(graph).is_file():
        raise UserError(f"session: no file {graph}; make it with runtime.export or runtime.dynamic_int8")
    options = session_options(torch.get_num_threads())
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class _Tower(nn.Module):
    """Stands where the vision tower was. The connector is in the graph, so nothing is left for the module of that name."""

    def __init__(self, graph: Path):
        super().__init__()
        self.session = session(graph)

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **_: object):
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if patch_attention_mask is not None and not patch_attention_mask.all():
            raise UserError("attach: a picture is padded; the graph takes whole pictures of the model's size: resize them to it")
        found = self.session.run(None, {"pixel_values": pixel_values.numpy()})[0]
        return BaseModelOutputWithPooling(last_hidden_state=torch.from_numpy(found))


class _Decoder(nn.Module):
    """Stands where the language model was. Each call reads the whole text anew: the graph has no KV cache."""

    def __init__(self, graph: Path, embed_tokens: nn.Module):
        super().__init__()
        self.embed_tokens, self.session = embed_tokens, session(graph)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, past_key_values=None, **_: object):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        if past_key_values is not None and past_key_values.get_seq_length():
            raise UserError("attach: this language model keeps no KV cache; call the model with use_cache=False")
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask.long()
        feeds = {"inputs_embeds": inputs_embeds.detach().numpy(), "attention_mask": mask.numpy()}
        return BaseModelOutputWithPast(last_hidden_state=torch.from_numpy(self.session.run(None, feeds)[0]))


def attach(model: nn.Module, graphs: Mapping[str, str | Path]) -> nn.Module:
    """A copy of `model` that computes in ONNX Runtime where `graphs` has a "vision" or a "language" file, else as before.

    `mmr.ask`, `evaluate.vqa` and `generate` work on it. Without a KV cache each new token reads the whole text again; the picture
    is still looked at once an answer.
    """
    if unknown := set(graphs) - set(PARTS):
        raise UserError(f"attach: graphs for {', '.join(sorted(unknown))}; expected {' and '.join(PARTS)}, as export gives them")
    core = model.model
    kept = {id(getattr(model, "processor", None)): getattr(model, "processor", None)}
    if "vision" in graphs:  # what is left out of the copy is never copied
        kept |= {id(core.vision_model): _Tower(graphs["vision"]), id(core.connector): nn.Identity()}
    if "language" in graphs:  # `kept` then also knows the copied embeddings, which a tied head must share
        kept[id(core.text_model)] = _Decoder(graphs["language"], copy.deepcopy(core.text_model.embed_tokens, kept))
    twin = copy.deepcopy(model, kept)
    if "language" in graphs:
        twin.generation_config.use_cache = twin.config.use_cache = False
    return twin.eval()


# ---- small print


def needs(*names: str) -> None:
    """ImportError that names the extra where one of these packages is missing."""
    import importlib.util

    if missing := [n for n in names if importlib.util.find_spec(n) is None]:
        raise ImportError(f"{missing[0]} is not installed; get it with: pip install 'mmrecipes[deploy]'")


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """A name beside `path`, renamed to it when all went well and removed when not. UserError where it cannot be written."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as e:
        raise UserError(f"{path}: could not be written ({one_line(e)}); choose a folder that you can write to") from e
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def prepared(graph: str | Path) -> Iterator[str]:
    """The graph with constants folded and shapes inferred, as the quantizer wants it, in a file that does not stay."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not Path(graph).is_file():
        raise UserError(f"no graph at {graph}; make it with runtime.export")
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder, quiet():
        try:
            whole = onnx.load(str(graph))
        except Exception as e:  # whatever a file that is none makes the parser raise
            raise UserError(f"{graph}: not an ONNX file ({one_line(e, 80)}); export it again") from e
        bare, ready = f"{folder}/bare.onnx", f"{folder}/ready.onnx"
        weights = {t.name for t in whole.graph.initializer}
        # the exporter notes the shapes of weights, too; the pre-processing turns weights of Gemm round and forgets these notes
        shapes = [v for v in whole.graph.value_info if v.name not in weights]
        del whole.graph.value_info[:]
        whole.graph.value_info.extend(shapes)
        onnx.save(whole, bare)
        del whole, shapes  # of a large model each copy counts
        quant_pre_process(bare, ready, skip_symbolic_shape=True)
        yield ready


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the known remarks of exporters and quantizers: of torchvision, of versions, of names of axes, of deprecations."""
    logs = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "transformers", None)]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        # the calibrators print what they do
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message="(?s).*(LeafSpec|The axis name|var_to_val|Mutation on a buffer).*")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
