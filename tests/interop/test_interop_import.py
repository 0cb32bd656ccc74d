"""Files of Hugging Face's libraries, from the folder to logits and text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from programs import run as run_program
from safetensors.numpy import load_file, save_file

from mtx.cli import main
from mtx.config.schema import RopeScaling
from mtx.errors import UserError
from mtx.inference.layout import open_run
from mtx.interop.importing import import_run

TINY = Path(__file__).parents[1] / "golden" / "hf-tiny"


def copy_folder(family: str, path: Path, **config: object) -> Path:
    """The folder of a family; a value of `...` removes a key of its config.json."""
    shutil.copytree(TINY / family, path)
    merged = {**json.loads((path / "config.json").read_text()), **config}
    (path / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))
    return path


def measure_error(run_dir: Path, inputs: Path, tmp_path: Path) -> float:
    """Largest difference from the logits in `inputs`, through the command."""
    out = tmp_path / "out.npz"
    assert main(["logits", str(run_dir), "--inputs", str(inputs), "--out", str(out)]) == 0
    with np.load(out) as found, np.load(inputs) as golden:
        assert found["logits"].dtype == np.float32
        return float(np.abs(found["logits"] - golden["logits"]).max())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_golden_logits(family, tmp_path):
    assert main(["import", str(TINY / family), "--out", str(tmp_path / "run")]) == 0
    # One row of the inputs is padded at its end.
    assert measure_error(tmp_path / "run", TINY / family / "io.npz", tmp_path) < 1e-4


def test_old_files_of_several_parts(tmp_path):
    """Names without prefix, weights in two files, a mask among them, positions by the old keys, an explicit copy."""
    folder = copy_folder(
        "llama", tmp_path / "hf", rope_parameters=..., rope_theta=10000.0, rope_scaling=None, head_dim=...
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{part}.safetensors"
        save_file({name.removeprefix("model."): tensors[name] for name in chosen}, folder / file)
        weight_map |= {name.removeprefix("model."): file for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_run(folder, tmp_path / "run")
    assert measure_error(tmp_path / "run", TINY / "llama" / "io.npz", tmp_path) < 1e-4


def test_text_from_an_imported_model_on_eight_devices_and_on_one(tmp_path, capsys):
    folder = copy_folder("gpt2", tmp_path / "hf")
    make_tokenizer(folder)
    command = ["import", str(folder), "--out", str(tmp_path / "run"), "--set"]
    assert main([*command, "Mesh.tensor = 16"]) == 2
    assert "needs 16 devices" in capsys.readouterr().err
    assert main([*command, "Mesh.tensor = 4"]) == 0
    capsys.readouterr()
    generate = [
        "generate",
        str(tmp_path / "run"),
        "--prompt",
        "the cat",
        "--max-tokens",
        "20",
        "--top-k",
        "50",
        "--json",
    ]
    assert main(generate) == 0
    sharded = json.loads(capsys.readouterr().out)
    one = run_program(["-m", "mtx", *generate, "--no-cache", "--cpu-devices", "1"])
    assert "one device computes" in one.stderr
    assert json.loads(one.stdout) == sharded
    assert sharded["samples"][0]["text"].startswith("the cat")
    assert len(sharded["samples"][0]["tokens"]) == 20


def make_tokenizer(folder: Path) -> None:
    """Bytes and nothing else, in the format of GPT-2's files."""
    from tokenizers.pre_tokenizers import ByteLevel

    space, *others = sorted(ByteLevel.alphabet(), key=lambda character: (character != "\u0120", character))
    tokens = [space, *others[:129], "<|endoftext|>"]  # 131 in all, as many as the model has
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_training_goes_on_from_imported_weights(tmp_path):
    folder = copy_folder("gpt2", tmp_path / "hf")
    make_tokenizer(folder)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    store, run_dir = tmp_path / "store", tmp_path / "run"
    assert main(["data", "build", str(tmp_path / "text.txt"), "--tokenizer", str(folder), "--out", str(store)]) == 0
    statements = [
        f"Data.train = {{'{store}': 1.0}}",
        "Train.steps = 1",
        "Train.seq_len = 16",
        "Train.global_batch_size = 8",
        "AdamW.learning_rate = 1e-3",
        "AdamW.weight_decay = 0.0",
    ]
    sets = [argument for statement in statements for argument in ("--set", statement)]
    assert main(["import", str(folder), "--out", str(run_dir), *sets]) == 0
    assert main(["train", str(run_dir / "config.gin"), "--run-dir", str(run_dir), "--quiet"]) == 0
    tables = [np.asarray(open_run(run_dir, step).params["positions"]["table"][:16]) for step in (0, 1)]
    # Adam's first step moves a parameter by the learning rate, whatever its gradient.
    np.testing.assert_allclose(np.abs(tables[1] - tables[0]), 1e-3, rtol=1e-2)


def test_imported_numbers_are_those_of_the_files(tmp_path):
    folder = copy_folder("gpt2", tmp_path / "hf", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(tensors, folder / "model.safetensors")
    directory = import_run(folder, tmp_path / "run", ["Train.seq_len = 32"])
    run = directory.config().run
    assert (run.train.seq_len, run.train.steps, run.model.tie_embeddings) == (32, 0, False)
    params = open_run(tmp_path / "run").params
    np.testing.assert_array_equal(params["head"]["table"], tensors["lm_head.weight"])
    key = params["layers"]["attention"]["key"]["weight"]
    np.testing.assert_array_equal(key[1], tensors["transformer.h.1.attn.c_attn.weight"][:, 32:64])


@pytest.mark.parametrize("keys", ["new", "old"])
def test_half_precision_and_stretched_positions(keys, tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    new: dict[str, object] = {"rope_parameters": {**scaling, "rope_type": "llama3", "rope_theta": 5e5}}
    old: dict[str, object] = {
        "rope_parameters": ...,
        "rope_theta": 500000,
        "rope_scaling": {**scaling, "type": "llama3"},
    }
    folder = copy_folder("llama", tmp_path / "hf", **(new if keys == "new" else old))
    dtype = ml_dtypes.bfloat16 if keys == "new" else np.float16
    tensors = {name: values.astype(dtype) for name, values in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model = import_run(folder, tmp_path / "run").config().run.model
    assert model.rope_theta == 5e5
    assert model.rope_scaling == RopeScaling(factor=8.0, original_max_seq_len=32)
    up = open_run(tmp_path / "run").params["layers"]["feedforward"]["up"]["weight"]
    np.testing.assert_array_equal(up[1], tensors["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32))


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type is 'bert'; this version imports gpt2, llama, mistral"),
        ("gpt2", {"activation_function": "mish"}, "'mish'; supported: gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"n_embd": "32"}, "n_embd is '32'; it must be of type int"),
        ("gpt2", {"n_layer": ...}, "n_layer is missing"),
        ("gpt2", {"n_head": 5}, "does not divide by Model.num_heads"),
        ("gpt2", {"quantization_config": {}}, "quantised"),
        ("llama", {"model_type": "mistral", "sliding_window": 8}, "sliding_window 8 is shorter"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'; supported: silu"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True; supported: False"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "'yarn'; supported: default, llama3"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ],
)
def test_what_we_cannot_compute_is_refused(family, config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        import_run(copy_folder(family, tmp_path / "hf", **config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_tensors_that_do_not_fit_are_named(tmp_path):
    folder = copy_folder("llama", tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.sinks"] = np.ones(4, np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((32, 16), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        import_run(folder, tmp_path / "run")
    message = str(caught.value)
    assert "6 tensors do not fit" in message
    for line in (
        "missing: model.norm.weight [32]",
        "missing: model.layers.0,1.mlp.up_proj.weight [48, 32]",
        "not part of the model: model.layers.0.self_attn.sinks [4]",
        "misshapen: model.layers.0.self_attn.k_proj.weight is [32, 16], the config asks for [16, 32]",
        "tied in the config and different in the files: model.embed_tokens.weight and lm_head.weight",
    ):
        assert line in message


def test_a_tied_head_may_be_in_the_files_again(tmp_path):
    folder = copy_folder("llama", tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert import_run(folder, tmp_path / "run").config().run.model.tie_embeddings


def test_damaged_and_foreign_files_are_refused(tmp_path):
    folder = copy_folder("gpt2", tmp_path / "hf")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def refuses(message: str) -> None:
        with pytest.raises(UserError, match=message):
            import_run(folder, tmp_path / "run")

    weights.write_bytes(whole[:-100])
    refuses("damaged")
    weights.rename(folder / "pytorch_model.bin")
    refuses("neither model.safetensors nor")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refuses("not in the folder")
    (folder / "config.json").write_text("{")
    refuses("not JSON")
    folder = tmp_path / "nothing"
    refuses("no such file or folder")


def test_a_run_directory_is_never_overwritten(tmp_path):
    import_run(TINY / "gpt2", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="already"):
        import_run(TINY / "llama", tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
