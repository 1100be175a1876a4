"""OpenCLIP towers: any of its models, with its own tokenizer and preprocessing, one copy per process.

The only module that imports open_clip (and it does so when towers are first loaded: the import is slow).
"""

import copy
import difflib
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.tokens import Tokenizer
from schemas import records
from schemas.errors import UserError
from schemas.feature_table import Precision, Preprocess, TableSpec, TowerSpec

DEMO = "fusion-demo"  # the small model that ships with us
_DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_CONTEXT_STEP = 8
_LEAST_CAPTION_TOKENS = 5  # with the one that begins it: as CoCa's own
_PROBE = (
    "",
    "a cat",
    "two dogs and a bird on a red roof",
    "a photograph of nothing in particular, taken at night " * 3,
)
_SAME_COSINE = {"fp32": 1 - 1e-6, "bf16": 1 - 1e-3, "fp16": 1 - 1e-4}
# open_clip's plain bf16 and fp16 leave some weights in fp32 (layer scales, pooling queries) and fail.
_ALL_OF_IT: dict[Precision, str] = {"fp32": "fp32", "bf16": "pure_bf16", "fp16": "pure_fp16"}
_LOADING = threading.Lock()
_LOADED: dict[tuple[str, str, str, Precision], "Towers"] = {}


class TowerError(UserError):
    """A model, its weights, device or precision that cannot be had, and what can."""


@dataclass(frozen=True)
class _Source:
    """Where a model's configuration and weights lie."""

    name: str  # what open_clip.create_model is asked for
    pretrained: str | None
    weights: Path
    bpe: Path | None = None  # the folder's own BPE vocabulary: open_clip does not look for it there


class Towers:
    """The image and the text tower of one model on one device. Safe to call from several threads.

    Rows do not influence each other, but kernels for few rows round differently from those for many. Padded to one
    number of rows (`pad_to`), a row's vector does not depend, to the bit, on which other rows came with it.
    """

    def __init__(self, spec: TowerSpec, model: Any, tokenizer: Any, device: str):
        import torch

        self.spec = spec
        self.device = device
        self.batch = _rows_in_a_forward(model, device)
        self._torch: Any = torch
        self._model = model
        self._tokenizer = Tokenizer(tokenizer)
        self._shortened: dict[int, Any] = {}  # by context length
        self._tokenizing = threading.Lock()  # Hugging Face's tokenizers do not like two callers
        self._copies = None if device == "cpu" else self._torch.cuda.Stream(device)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[spec.precision]
        # (pixel / 255 - mean) / std as one multiply-add over rows of width × 3 values
        mean, std = (torch.tensor(values) for values in (spec.preprocess.mean, spec.preprocess.std))
        self._scale, self._shift = (
            row.repeat(spec.preprocess.width).to(device) for row in (1 / (255 * std), -mean / std)
        )
        self.text_spec = spec
        self._pool_early()
        self._cuts_context = self._can_cut_context()

    @property
    def logit_scale(self) -> float:
        """What the model was trained to multiply cosines with before a softmax."""
        return float(self._model.logit_scale.detach().float().exp())

    def embed_images(self, pixels: np.ndarray, pad_to: int = 1) -> np.ndarray:
        """Unit vectors, float32 [n, D], of preprocessed images, uint8 [n, H, W, 3]."""
        with self._torch.inference_mode():
            return self._unit(self._model.encode_image(self._normal(pixels, pad_to)), len(pixels))

    def _normal(self, pixels: np.ndarray, pad_to: int) -> Any:
        """The pixels as the image tower's input, [n, 3, H, W] on the device."""
        torch = self._torch
        batch = self._moved(_padded(pixels, pad_to))
        rows = batch.flatten(0, 1).flatten(1).to(torch.float32)
        normal = torch.addcmul(self._shift, rows, self._scale, out=rows).view(batch.shape)
        return normal.permute(0, 3, 1, 2).to(self._dtype)

    def embed_texts(
        self,
        texts: list[str],
        pad_to: int = 1,
        done: Callable[[np.ndarray, np.ndarray], None] = lambda rows, vectors: None,
    ) -> np.ndarray:
        """Unit vectors, float32 [n, D], of captions; what exceeds the tower's context length is cut off.

        `done` is told of each forward: which of the texts, int64 [m], and their vectors, float32 [m, D].
        """
        with self._tokenizing:
            tokens = self._tokenizer(texts)
        lengths = self._context_lengths(tokens)
        vectors = np.empty((len(texts), self.spec.embedding_dim), np.float32)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for some in np.array_split(rows, range(pad_to, len(rows), pad_to)) if pad_to > 1 else [rows]:
                vectors[some] = self._embed_tokens(tokens[some, :length], pad_to)
                done(some, vectors[some])
        return vectors

    def check_captions(self) -> None:
        """Raises TowerError unless the model writes captions: CoCa models do."""
        if not hasattr(self._model, "text_decoder"):
            raise TowerError(f"{self.spec.model} writes no captions: name a CoCa model, such as coca_ViT-B-32")
        if not hasattr(self._tokenizer.inner, "decoder"):
            raise TowerError(f"{self.spec.model}: its tokenizer does not turn tokens into text")

    def caption_images(self, pixels: np.ndarray, max_tokens: int = 30, pad_to: int = 1) -> list[str]:
        """A caption of at most `max_tokens` tokens for each preprocessed image, uint8 [n, H, W, 3].

        Each token is the likeliest after those before it, and there are at least four. This is what CoCa's own
        `generate` does with `generation_type="top_k", top_k=1`; that needs transformers 4.56, whose beam search
        left in 4.57, and which cannot be installed beside a current huggingface_hub.
        """
        torch, tokenizer = self._torch, self._tokenizer.inner
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        length = min(max_tokens + 1, self._model.context_length)
        with torch.inference_mode():
            latent, image_tokens = self._model._encode_image(self._normal(pixels, pad_to))
            tokens = torch.full((len(latent), 1), start, device=self.device)
            ended = torch.zeros(len(latent), dtype=torch.bool, device=self.device)
            while tokens.shape[1] < length and not bool(ended[: len(pixels)].all()):
                known = {"image_latent": latent, "image_embs": image_tokens, "output_labels": False}
                logits = self._model(None, tokens, **known)["logits"][:, -1].float()
                logits[:, [start, *range(len(tokenizer.decoder), logits.shape[1])]] = -torch.inf
                if tokens.shape[1] < _LEAST_CAPTION_TOKENS:
                    logits[:, end] = -torch.inf
                chosen = torch.where(ended, end, logits.argmax(dim=1))
                ended = ended | (chosen == end)
                tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        written = ([token for token in row if token not in (start, end)] for row in tokens[: len(pixels)].tolist())
        return [" ".join(tokenizer.decode(row).split()) for row in written]

    def _embed_tokens(self, tokens: np.ndarray, pad_to: int) -> np.ndarray:
        with self._torch.inference_mode():
            batch = self._moved(_padded(tokens, pad_to))
            return self._unit(self._with_context(tokens.shape[1]).encode_text(batch), len(tokens))

    def _moved(self, rows: np.ndarray) -> Any:
        """The rows as a tensor on the device; on a GPU copied from pinned memory beside what it computes."""
        torch, tensor = self._torch, self._torch.from_numpy(rows)
        if self._copies is None:
            return tensor
        computes = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
        computes.wait_stream(self._copies)
        moved.record_stream(computes)
        return moved

    def _context_lengths(self, tokens: np.ndarray) -> np.ndarray:
        """How much of the context each row needs: its tokens up to the last that is no padding, in steps of 8.

        A row's length depends on the row alone, so that its vector does not depend on its neighbours.
        """
        context = tokens.shape[1]
        if not self._cuts_context:
            return np.full(len(tokens), context)
        used = context - np.argmax(tokens[:, ::-1] != 0, axis=1)
        return np.asarray(np.minimum(-(-used // _CONTEXT_STEP) * _CONTEXT_STEP, context))

    def _with_context(self, length: int) -> Any:
        """The model with a text tower of the first `length` positions; all weights are shared."""
        if length == self._model.context_length:
            return self._model
        if length not in self._shortened:
            self._shortened[length] = _shortened(self._model, length)
        return self._shortened[length]

    def _pool_early(self) -> None:
        """Has the last block of the image tower compute the pooled token alone, where that is a ViT's class token and
        a probe proves that nothing else changes.
        """
        visual = self._model.visual
        block = _last_block(visual)
        if block is None:
            return
        size = self.spec.preprocess
        probe = np.random.default_rng(0).integers(0, 256, (4, size.height, size.width, 3), np.uint8)
        whole = self.embed_images(probe)
        visual.transformer.resblocks[-1] = _class_token_only(block)
        if np.einsum("nd,nd->n", whole, self.embed_images(probe)).min() < _SAME_COSINE[self.spec.precision]:
            visual.transformer.resblocks[-1] = block

    def _can_cut_context(self) -> bool:
        """Whether leaving out padding changes nothing: looked up in the tower, then proved on a probe.

        So it is where no position looks at a later one and the vector is taken at the end of the text.
        """
        tower = self._model if hasattr(self._model, "transformer") else getattr(self._model, "text", None)
        pooled = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
        mask = getattr(tower, "attn_mask", None)
        if mask is None or pooled not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
            return False
        if not bool((mask.triu(1) == float("-inf")).logical_or(mask.tril() == mask).all()):
            return False
        tokens = self._tokenizer(list(_PROBE))
        if tokens.shape[1] != self._model.context_length:
            return False
        whole = self._embed_tokens(tokens, 1)
        self._cuts_context = True
        lengths = self._context_lengths(tokens)
        cut = [self._embed_tokens(tokens[i : i + 1, :length], 1)[0] for i, length in enumerate(lengths)]
        return bool(np.einsum("nd,nd->n", whole, np.stack(cut)).min() > _SAME_COSINE[self.spec.precision])

    def _unit(self, features: Any, n: int) -> np.ndarray:
        vectors = self._torch.nn.functional.normalize(features[:n].float(), dim=-1).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise TowerError(
                f"{self.spec.model} in {self.spec.precision} gives non-finite embeddings: "
                + ("its weights are broken" if self.spec.precision == "fp32" else "use fp32")
            )
        return np.asarray(vectors)


class PairedTowers(Towers):
    """The image tower of one model and the text tower of another that was trained for the same space."""

    def __init__(self, image: Towers, text: Towers):
        self.__dict__.update(image.__dict__)
        self.text_spec = text.spec
        self._text = text

    @property
    def logit_scale(self) -> float:
        """That of the text tower's model, which was the last to be trained."""
        return self._text.logit_scale

    def embed_texts(
        self,
        texts: list[str],
        pad_to: int = 1,
        done: Callable[[np.ndarray, np.ndarray], None] = lambda rows, vectors: None,
    ) -> np.ndarray:
        """Unit vectors, float32 [n, D], of captions, by the text tower's model."""
        return self._text.embed_texts(texts, pad_to, done)


def load(model: str, pretrained: str = "", device: str = "auto", precision: str = "auto") -> Towers:
    """The towers of a model, loaded once per process.

    `model`: a name of open_clip's, `hf-hub:…`, a folder or `local-dir:…` with open_clip_config.json and weights, a
    model-config JSON, or `fusion-demo`. `pretrained`: a tag of open_clip's or a weights file, where the model does not
    bring its own. `device`: auto, cpu, cuda, cuda:N. `precision`: auto, fp32, bf16, fp16. Raises TowerError.
    """
    device = pick_device(device)
    key = (absolute(model), absolute(pretrained), device, _pick_precision(precision, device))
    with _LOADING:
        if key not in _LOADED:
            _LOADED[key] = _load(*key)
        return _LOADED[key]


def one_thread_each() -> None:
    """Lets every thread that calls a tower compute by itself: on a CPU, units side by side are faster than one unit in
    many threads, and rounding does not depend on how many there are.
    """
    import torch

    torch.set_num_threads(1)


def for_spec(spec: TowerSpec, device: str = "auto", pretrained: str = "") -> Towers:
    """The towers that a table or index was made with; raises TowerError naming what differs.

    `pretrained`: where the weights lie now, if they were moved.
    """
    towers = load(spec.model, pretrained or spec.pretrained, device, spec.precision)
    here, there = (replace(item, model="", pretrained="") for item in (towers.spec, spec))
    if here != there:
        raise TowerError(f"{spec.model} is not what it was: " + "; ".join(records.differences(here, there)))
    return towers


def for_table(spec: TableSpec, device: str = "auto", pretrained: str = "") -> Towers:
    """The towers that a table or an index was made with, be they of one model or of two; raises TowerError.

    `pretrained`: where the weights lie now, if they were moved; of two models, those of the images.
    """
    towers = for_spec(spec.tower, device, pretrained)
    return PairedTowers(towers, for_spec(spec.text_tower, device)) if spec.text_tower else towers


def are_unchanged(spec: TowerSpec, model: str, pretrained: str = "") -> bool:
    """Whether the names are the spec's and weights on this disk are still its own: told without importing open_clip,
    which takes seconds. False, too, where it cannot be told.
    """
    if (absolute(model), absolute(pretrained)) != (spec.model, spec.pretrained):
        return False
    folder = _DEMO_FOLDER if model == DEMO else Path(model)
    places = [Path(pretrained)] if pretrained else [folder / name for name in _WEIGHTS]
    weights = next((place for place in places if place.is_file()), None)
    return weights is not None and _sha256(weights) == spec.weights_sha256


def pick_device(device: str) -> str:
    """cpu, cuda or cuda:N for what was asked for; raises TowerError."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        raise TowerError(f"device {device!r} is not auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TowerError(f"device {device!r}: torch sees no GPU here; use --device cpu or auto")
    return device


def absolute(name: str) -> str:
    """A path in the form that holds in every working folder; other names as they are."""
    path = Path(name.removeprefix("local-dir:"))
    return str(path.resolve()) if name and path.exists() else name


def _load(model: str, pretrained: str, device: str, precision: Precision) -> Towers:
    import open_clip

    source = _find(model, pretrained)
    try:
        network: Any = open_clip.create_model(
            source.name,
            pretrained=source.pretrained,
            precision=_ALL_OF_IT[precision],
            device=device,
            require_pretrained=True,
        )
        tokenizer = _tokenizer(source)
    except Exception as error:
        raise TowerError(f"cannot load {model!r} with the weights {source.weights}: {error}") from error
    network.eval()  # its weights keep requires_grad: without it torch multiplies with a copy of them for each row
    config = open_clip.get_model_config(source.name)
    spec = TowerSpec(
        model=model,
        pretrained=pretrained,
        config_sha256=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        weights_sha256=_sha256(source.weights),
        embedding_dim=int(config["embed_dim"]),
        precision=precision,
        preprocess=_preprocess(network.visual.preprocess_cfg),
    )
    try:
        towers = Towers(spec, network, tokenizer, device)
        towers.embed_images(np.zeros((1, spec.preprocess.height, spec.preprocess.width, 3), np.uint8))
        towers.embed_texts([""])
    except RuntimeError as error:
        remedy = "" if precision == "fp32" else "; --precision fp32 may do"
        raise TowerError(f"{model!r} does not compute in {precision} on {device}: {error}{remedy}") from error
    return towers


# --- where models are found -----------------------------------------------------------------------------------------


def _find(model: str, pretrained: str) -> _Source:
    import open_clip

    if model == DEMO:
        return _find_folder(_DEMO_FOLDER, pretrained)
    if model.startswith("hf-hub:"):
        return _find_hub(model, pretrained)
    path = Path(model)
    if path.is_dir():
        return _find_folder(path, pretrained)
    if path.suffix == ".json" and path.is_file():
        open_clip.add_model_config(path)
        model = path.stem
    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, [DEMO, *open_clip.list_models()], n=4, cutoff=0.5)
        raise TowerError(
            f"no model {model!r}: " + (f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models().")
            + " A folder with open_clip_config.json, a model-config JSON and hf-hub:… are possible, too"
        )  # fmt: skip
    return _find_weights(model, pretrained)


def _find_weights(model: str, pretrained: str) -> _Source:
    """Weights of one of open_clip's architectures: a file, or a tag that open_clip knows where to fetch."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    if Path(pretrained).is_file():
        return _Source(model, pretrained, Path(pretrained))
    tags = list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        near = difflib.get_close_matches(pretrained, tags, n=4, cutoff=0.3) or tags[:8]
        asked = (
            f"no weights {pretrained!r} for {model}: neither a file nor a tag"
            if pretrained
            else f"{model} needs weights"
        )
        raise TowerError(f"{asked}; --pretrained is a file or one of {', '.join(near) or '(no tags are known)'}")
    try:
        path = Path(download_pretrained(get_pretrained_cfg(model, pretrained)))
    except Exception as error:
        raise TowerError(f"cannot fetch the weights {pretrained!r} of {model}: {error}") from error
    return _Source(model, pretrained, path)


def _find_folder(folder: Path, pretrained: str) -> _Source:
    if pretrained:
        raise TowerError(f"{folder} brings its own weights: leave out --pretrained {pretrained}")
    if not (folder / "open_clip_config.json").is_file():
        raise TowerError(f"{folder} holds no open_clip_config.json")
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise TowerError(f"{folder} holds no weights: expected {', '.join(_WEIGHTS)}")
    bpe = next(iter(sorted(folder.glob("*bpe*.txt.gz"))), None)
    return _Source(f"local-dir:{folder.resolve()}", None, weights, bpe)


def _find_hub(model: str, pretrained: str) -> _Source:
    from open_clip.pretrained import download_pretrained_from_hf

    if pretrained:
        raise TowerError(f"{model} brings its own weights: leave out --pretrained {pretrained}")
    try:
        return _Source(model, None, Path(download_pretrained_from_hf(model.removeprefix("hf-hub:"))))
    except Exception as error:
        raise TowerError(f"cannot fetch {model}: {error}") from error


def _tokenizer(source: _Source) -> Any:
    import open_clip

    # A folder's config may name its vocabulary relative to itself; open_clip resolves it against the working folder.
    return open_clip.get_tokenizer(source.name, **({"bpe_path": str(source.bpe)} if source.bpe else {}))


def _preprocess(config: dict[str, Any]) -> Preprocess:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if config["interpolation"] not in ("bicubic", "bilinear"):
        raise TowerError(f"interpolation {config['interpolation']!r} is not bicubic or bilinear")
    return Preprocess(
        height=int(height),
        width=int(width),
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        interpolation=config["interpolation"],
        resize_mode=config["resize_mode"],
        fill_color=int(config["fill_color"]),
    )


# --- device and precision -------------------------------------------------------------------------------------------


def _pick_precision(precision: str, device: str) -> Precision:
    """auto: bf16 where the processor or the GPU has instructions for it, else fp32 on a CPU and fp16 on a GPU.

    On a CPU bf16 weights are twice as fast as fp32 with such instructions, and 4 to 14 times slower without.
    """
    import torch

    if precision in ("fp32", "bf16", "fp16"):
        if precision == "fp16" and device == "cpu":
            raise TowerError("precision fp16 needs a GPU; use fp32 or bf16 on the CPU")
        return precision  # type: ignore[return-value]
    if precision != "auto":
        raise TowerError(f"precision {precision!r} is not auto, fp32, bf16 or fp16")
    if device == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _shortened(model: Any, length: int) -> Any:
    """A copy of the model, sharing its weights, whose text tower has a context of `length` tokens."""
    if hasattr(model, "transformer"):
        return _with_first_positions(model, length)
    short = copy.copy(model)
    short._modules = {**model._modules, "text": _with_first_positions(model.text, length)}
    return short


def _with_first_positions(tower: Any, length: int) -> Any:
    short = copy.copy(tower)
    positions = type(tower.positional_embedding)(tower.positional_embedding[:length], requires_grad=False)
    short._parameters = {**tower._parameters, "positional_embedding": positions}
    short._buffers = {**tower._buffers, "attn_mask": tower.attn_mask[:length, :length]}
    return short


def _last_block(visual: Any) -> Any:
    """The last block of a ViT of open_clip's that hands on its class token alone; None for every other tower."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.pool_type != "tok" or visual.attn_pool is not None:
        return None
    if visual.output_tokens or not visual.transformer.batch_first:
        return None
    block = visual.transformer.resblocks[-1]
    return block if type(block) is ResidualAttentionBlock else None


def _class_token_only(block: Any) -> Any:
    """A residual attention block that attends to every token and returns the first alone: [n, L, C] to [n, 1, C]."""
    import torch

    attention, linear = block.attn, torch.nn.functional.linear
    width, heads = attention.embed_dim, attention.num_heads

    class ClassTokenOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, tokens: Any, attn_mask: None = None) -> Any:
            weight, bias = attention.in_proj_weight, attention.in_proj_bias
            normal = block.ln_1(tokens)
            query = linear(normal[:, 0], weight[:width], bias[:width])
            both = linear(normal, weight[width:], bias[width:]).view(*normal.shape[:2], 2, heads, -1)
            key, value = both.permute(2, 0, 3, 1, 4)
            query = query.view(len(query), heads, 1, -1)
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            first = tokens[:, 0] + block.ls_1(attention.out_proj(mixed.flatten(1)))
            return (first + block.ls_2(block.mlp(block.ln_2(first))))[:, None]

    return ClassTokenOnly()


def _rows_in_a_forward(model: Any, device: str) -> int:
    """How many rows a forward has by default: on a CPU no more than make the call itself cheap, as more pad more."""
    if device != "cpu":
        return 256
    return 16 if sum(weights.numel() for weights in model.visual.parameters()) > 10**7 else 64


def _padded(rows: np.ndarray, pad_to: int) -> np.ndarray:
    missing = max(0, pad_to - len(rows))
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
