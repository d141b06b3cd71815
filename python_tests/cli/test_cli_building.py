"""Which class of transformers is built of a config, and what is said where none can be."""

import json
import sys

import pytest
import transformers

SMALL = {"vocab_size": 120, "max_position_embeddings": 32}
WIDTHS = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 1}
HEADS = {"encoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "whisper": (
        "WhisperForConditionalGeneration",
        {**WIDTHS, **HEADS, "vocab_size": 120, "pad_token_id": 0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 120},
    ),
    "bart": ("BartForConditionalGeneration", {**SMALL, **WIDTHS, **HEADS}),
    "bert": ("BertForMaskedLM", {**SMALL, **HIDDEN, "intermediate_size": 32}),
    "vit": (
        "ViTForImageClassification",
        {**HIDDEN, "intermediate_size": 32, "image_size": 16, "patch_size": 8},
    ),
}


@pytest.fixture
def write_config(tmp_path):
    """Writes a config and says in which directory."""

    def write(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("kind", MODELS)
def test_the_class_that_the_config_names_is_built(json_of, write_config, kind):
    name, options = MODELS[kind]
    config = transformers.AutoConfig.for_model(kind, **options)
    params = list(getattr(transformers, name)(config).parameters())
    path = write_config(model_type=kind, architectures=[name], **options)
    facts = json_of(f"plan --config {path} --rank 4 --dtype fp32")
    assert facts["architecture"] == name
    assert facts["parameters"] == sum(param.numel() for param in params)
    trained = sum(param.numel() for param in params if param.requires_grad)
    assert facts["gradient_bytes"] == 4 * trained
    rows = json_of(f"explain --config {path} --rank 4")
    assert rows["architecture"] == name
    assert rows["elements"] == facts["parameters"]


def test_a_config_that_names_no_class_is_a_language_model_and_says_so(command, write_config):
    path = write_config(model_type="whisper", **MODELS["whisper"][1])
    for name in ("plan", "explain"):
        status, out, _ = command(f"{name} --config {path} --rank 4")
        assert status == 0
        assert f"{path}: WhisperForCausalLM, " in out


def test_the_rank_of_a_model_with_a_language_model_in_it(json_of, write_config):
    text = {"model_type": "llama", **HIDDEN, "intermediate_size": 32, "vocab_size": 120}
    vision = {**MODELS["vit"][1], "model_type": "clip_vision_model"}
    path = write_config(
        model_type="llava",
        architectures=["LlavaForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
    )
    assert json_of(f"plan --config {path}")["rank"] == 16 // 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "vit"}, "tried AutoModelForCausalLM by default: ValueError: Unrecognized"),
        (
            {"model_type": "llama", "architectures": ["MyLlama"]},
            f"tried MyLlama, which the config names: LookupError: transformers"
            f" {transformers.__version__} has no such model",
        ),
        ({"model_type": "llama", "architectures": ["LlamaConfig"]}, "has no such model"),
        (
            {"model_type": "bert", "architectures": ["LlamaForCausalLM"]},
            "tried LlamaForCausalLM, which the config names",
        ),
    ],
)
def test_an_error_names_the_class_that_was_tried(refused, write_config, config, words):
    assert words in refused(f"plan --config {write_config(**config, **HIDDEN)} --rank 4")


def test_a_config_is_a_file_or_the_directory_that_holds_it(command, tiny_config):
    file = tiny_config()
    by_file, by_directory = (command(f"plan --config {path}") for path in (file, file.parent))
    assert by_file[0] == by_directory[0] == 0
    assert by_file[1].splitlines()[1:] == by_directory[1].splitlines()[1:]


def test_a_directory_without_a_config(refused, tmp_path):
    assert f"{tmp_path}: there is no config.json in this directory" in refused(
        f"plan --config {tmp_path}"
    )


def test_nobody_is_asked_to_trust_the_code_that_a_config_names(refused, write_config, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    path = write_config(model_type="new-model", auto_map={"AutoConfig": "configuration.New"})
    assert "custom code" in refused(f"plan --config {path}")
    assert not asked


@pytest.mark.parametrize("name", ["plan", "explain"])
def test_without_transformers(refused, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refused(f"{name} --model nano")


@pytest.fixture
def broken_transformers(monkeypatch, tmp_path):
    """Puts a package of this source in the place of transformers."""

    def write(source):
        (tmp_path / "transformers.py").write_text(source)
        monkeypatch.delitem(sys.modules, "transformers")
        monkeypatch.syspath_prepend(tmp_path)

    return write


def test_transformers_that_does_not_import(refused, broken_transformers):
    broken_transformers("raise OSError('libfoo.so: no such file')")
    line = refused("plan --model nano")
    assert "transformers does not import: OSError: libfoo.so: no such file" in line


# As transformers is beside a torchvision that does not fit: it imports, and fails at the first use.
BROKEN_AT_USE = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        raise RuntimeError("operator torchvision::nms\\ndoes not exist")
    except RuntimeError as error:
        raise ModuleNotFoundError(f"Could not import module {name}") from error
"""


def test_transformers_that_breaks_when_it_is_used(refused, broken_transformers, tiny_config):
    broken_transformers(BROKEN_AT_USE)
    for model in ("--model nano", f"--config {tiny_config()}"):
        line = refused(f"plan {model}")
        assert "Could not import module" in line
        assert "from RuntimeError: operator torchvision::nms does not exist" in line


def test_a_model_that_breaks_when_it_is_built(refused, monkeypatch):
    def fail(*args, **options):
        raise AssertionError

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", fail)
    assert "LlamaForCausalLM, which the config names: AssertionError" in refused(
        "plan --model nano"
    )
