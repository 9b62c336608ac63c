"""Published NemotronLabsDiffusion directories, and directories that are refused."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemodiff_train.cli import main
from tests import small

COMMON = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "auto_map": {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "5.0.0",
    "attn_implementation": "sdpa",
    "use_cache": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
    "bos_token_id": 1,
    "eos_token_id": 11,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mask_token_id": 100,
    "block_size": 32,
    "dlm_paradigm": "bidirectional",
    "ar_loss_weight": 1.0,
    "dlm_loss_weight": None,
    "dp_varying_mask_ratio": False,
    "max_position_embeddings": 262144,
}
ROPE = {**small.YARN, "original_max_position_embeddings": 16384}
SIZES = {
    "3B": {"hidden_size": 3072, "num_hidden_layers": 26, "intermediate_size": 9216, "rope_parameters": ROPE},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 34, "intermediate_size": 14336, "rope_parameters": ROPE},
    "14B": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "intermediate_size": 16384,
        "rope_parameters": {**ROPE, "rope_theta": 1e9},
    },
}
BASE = {"eos_token_id": 2, "max_position_embeddings": 4096, "rope_parameters": {**ROPE, "factor": 0.25}}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "3B": ({**COMMON, **SIZES["3B"]}, 237),
    "3B-Base": ({**COMMON, **SIZES["3B"], **BASE}, 237),
    "8B": ({**COMMON, **SIZES["8B"]}, 309),
    "14B": ({**COMMON, **SIZES["14B"]}, 363),
}


def published_shapes(settings: dict[str, Any]) -> dict[str, list[int]]:
    """Every tensor of a published directory, as its files list them."""
    hidden, wide, vocabulary = (settings[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [4096, hidden],
        "self_attn.k_proj": [1024, hidden],
        "self_attn.v_proj": [1024, hidden],
        "self_attn.o_proj": [hidden, 4096],
        "mlp.gate_proj": [wide, hidden],
        "mlp.up_proj": [wide, hidden],
        "mlp.down_proj": [hidden, wide],
    }
    layers = range(settings["num_hidden_layers"])
    return {
        "encoder.embed_tokens.weight": [vocabulary, hidden],
        "encoder.norm.weight": [hidden],
        "diffusion_head.weight": [vocabulary, hidden],
        **{f"encoder.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()},
    }


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(tmp_path: Path, size: str) -> None:
    """Laid out as an export lays them out: names, shapes, dtype and number of the tensors, and the settings."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.conversion.formats import nemotron_format
    from nemodiff_train.conversion.shards import ShardWriter
    from nemodiff_train.conversion.weights import check_weights
    from nemodiff_train.model.hf_directory import HFDirectory, expected_shapes
    from nemodiff_train.model.pretrained import model_from

    settings, count = PUBLISHED[size]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    provider = model_from(str(tmp_path))
    rope = settings["rope_parameters"]
    assert (provider.mask_token_id, provider.block_size, provider.kv_channels) == (100, 32, 128)
    assert (provider.rotary_base, provider.yarn_rotary_scaling_factor) == (rope["rope_theta"], rope["factor"])
    assert provider.params_dtype == torch.bfloat16 and not provider.share_embeddings_and_output_weights
    assert nemotron_format(provider) == settings

    writer = ShardWriter(tmp_path, expected_shapes(settings), torch.bfloat16)
    writer.create_files()  # the data are holes in the files
    check_weights(directory := HFDirectory(tmp_path))
    stored = directory.weights
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == published_shapes(settings)
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"} and len(stored) == count
    if (
        size == "3B-Base"
    ):  # published as one file of this many bytes, of which the header's padding is a matter of taste
        assert abs(7_663_347_000 - 8 - writer.total) < 40_000
    assert max(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 5_001_000_000


def test_keys_that_a_file_leaves_out() -> None:
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.model.families import diffusion_settings
    from nemodiff_train.model.pretrained import config_from

    settings = {"architectures": ["NemotronLabsDiffusionModel"], "model_type": "nemotron_labs_diffusion"}
    diffusion: Any = {"mask_token_id": None, "block_size": 32, "shift": False, "clean_attention": "causal"}
    assert diffusion_settings(settings) == diffusion_settings({**settings, "mask_token_id": -1}) == diffusion
    foreign = {"shift": True, "clean_attention": "block_causal"}  # NVIDIA's code knows neither
    assert diffusion_settings({**settings, **foreign}) == diffusion
    sdar = {"architectures": ["SDARForCausalLM"]}
    assert diffusion_settings(sdar)["mask_token_id"] == 151669
    assert diffusion_settings({**sdar, "mask_token_id": -1})["mask_token_id"] is None
    config: Any = config_from(settings)
    assert config.eos_token_id == 2
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 14336, 34)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of another publisher, and one that this project has written in several files."""
    folder = tmp_path_factory.mktemp("good")
    small.nemotron(folder / "theirs", layers=4)
    words = [str(folder / name) for name in ("theirs", "megatron", "ours")]
    assert main(["convert", "import", *words[:2]]) == 0
    assert main(["convert", "export", *words[1:], "--max-shard-size", "150KB"]) == 0
    return folder


Tensors = dict[str, Tensor]
LAYER = "encoder.layers.1.mlp.up_proj.weight"


def rewrite(change: Callable[[Tensors], Tensors | None]) -> Callable[[Path], None]:
    """A change of the one weight file."""

    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        save_file(change(tensors) or tensors, file)

    return damage


def settle(**changes: Any) -> Callable[[Path], None]:
    """A change of ``config.json``."""

    def damage(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def reindex(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    """A change of the index."""

    def damage(directory: Path) -> None:
        file = directory / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return damage


def flip(directory: Path) -> None:
    """One bit, in the middle of the data of a file of ours."""
    file = directory / "model-00002-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(size: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        file = next(iter(sorted(directory.glob("*.safetensors"))))
        file.write_bytes(file.read_bytes()[:size])

    return damage


def pickled(directory: Path) -> None:
    """What unpickling would run must not run."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path(directory, "trapped").touch, ())

    torch.save({"weights": Trap()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def remote_only(directory: Path) -> None:
    settle(model_type="mine", architectures=["MineForCausalLM"], auto_map={"AutoConfig": "mine.MineConfig"})(
        directory
    )
    (directory / "mine.py").write_text("from pathlib import Path\nPath(__file__).with_name('trapped').touch()\n")


# Which directory is damaged, how, and what the one line must name.
CASES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "truncated": ("theirs", cut(-1000), ["model.safetensors", "incomplete"]),
    "empty file": ("theirs", cut(0), ["model.safetensors", "incomplete"]),
    "cut inside the header": ("theirs", cut(100), ["model.safetensors", "incomplete"]),
    "an error page instead": (
        "theirs",
        lambda d: (d / "model.safetensors").write_text("<html>404</html>"),
        ["model.safetensors"],
    ),
    "flipped bit": ("ours", flip, ["model-00002-of-00004.safetensors", "encoder.layers.", "has changed"]),
    "not a number": (
        "theirs",
        rewrite(lambda t: t[LAYER].view(-1)[7:8].fill_(float("inf")) and None),
        ["model.safetensors", LAYER, "NaN"],
    ),
    "half downloaded": (
        "ours",
        lambda d: (d / "model-00003-of-00004.safetensors").unlink(),
        ["model-00003-of-00004.safetensors", "missing"],
    ),
    "half downloaded, no index": (
        "ours",
        lambda d: [
            (d / name).unlink() for name in ("model-00003-of-00004.safetensors", "model.safetensors.index.json")
        ],
        ["model-00003-of-00004.safetensors", "missing"],
    ),
    "index is cut off": (
        "ours",
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a'),
        ["model.safetensors.index.json"],
    ),
    "index names another file": (
        "ours",
        reindex(lambda m: m.update({"encoder.norm.weight": "model-00001-of-00004.safetensors"})),
        ["encoder.norm.weight", "model-00001-of-00004.safetensors"],
    ),
    "index leaves one out": ("ours", reindex(lambda m: m.pop(LAYER) and None), [LAYER, "model-0000"]),
    "index points elsewhere": (
        "ours",
        reindex(lambda m: m.update({LAYER: "../theirs/model.safetensors"})),
        ["../theirs/model.safetensors"],
    ),
    "mixed dtypes": (
        "theirs",
        rewrite(lambda t: {**t, LAYER: t[LAYER].bfloat16()}),
        ["model.safetensors", LAYER, "BF16", "F32"],
    ),
    "not floating point": (
        "theirs",
        rewrite(lambda t: {name: tensor.to(torch.int8) for name, tensor in t.items()}),
        ["model.safetensors", "I8"],
    ),
    "missing tensor": ("theirs", rewrite(lambda t: t.pop(LAYER) is None or None), [LAYER, "lacks"]),
    "extra tensor": ("theirs", rewrite(lambda t: {**t, "encoder.extra": torch.ones(2)}), ["encoder.extra"]),
    "wrong shape": ("theirs", rewrite(lambda t: {**t, LAYER: t[LAYER][1:].clone()}), [LAYER, "[95, 48]", "[96, 48]"]),
    "more layers than the weights": ("theirs", settle(num_hidden_layers=5), ["encoder.layers.4.", "lacks"]),
    "an output layer beside a tied one": ("theirs", settle(tie_word_embeddings=True), ["diffusion_head.weight"]),
    "quantized": ("theirs", settle(quantization_config={"quant_method": "fp8"}), ["quantized"]),
    "settings of the wrong type": ("theirs", settle(hidden_size="many"), ["hidden_size"]),
    "settings are cut off": ("theirs", lambda d: (d / "config.json").write_text('{"a'), ["config.json"]),
    "pickle only": ("theirs", pickled, ["only safetensors"]),
    "its own code only": ("theirs", remote_only, ["MineForCausalLM"]),
    "vision-language diffusion": (
        "theirs",
        settle(architectures=["NemotronLabsDiffusionVLMModel"], model_type="nemotron_labs_diffusion_vlm"),
        ["NemotronLabsDiffusionVLMModel"],
    ),
    "rope scaling that Megatron lacks": (
        "theirs",
        settle(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}),
        ["dynamic"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_directories(
    case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, damage, needles = CASES[case]
    shutil.copytree(good / kind, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["convert", "import", "damaged", "out"]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("nemodiff: error: ") and told.out == ""
    for needle in needles:
        assert needle in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tied_output_layer_may_be_written_out(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "theirs", tmp_path / "tied")
    rewrite(lambda t: {**t, "diffusion_head.weight": t["encoder.embed_tokens.weight"].clone()})(tmp_path / "tied")
    settle(tie_word_embeddings=True)(tmp_path / "tied")
    imported, back = str(tmp_path / "imported"), str(tmp_path / "back")
    assert main(["convert", "import", str(tmp_path / "tied"), imported]) == 0
    assert main(["convert", "export", imported, back]) == 0
    after = load_file(f"{back}/model.safetensors")
    assert torch.equal(after["diffusion_head.weight"], after["encoder.embed_tokens.weight"])


def test_a_full_disk_leaves_nothing(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands in for a disk that is full."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(["convert", "export", str(good / "megatron"), "out"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "cannot write 'out'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["convert", "export", str(good / "megatron"), "out", "--max-shard-size", "5 apples"]) == 2
    assert "--max-shard-size 5 apples" in capsys.readouterr().err and not list(tmp_path.iterdir())
