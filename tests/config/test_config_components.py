"""What the schema and the components declare, held against the rules that the reader relies on."""

import dataclasses

import pytest

from mtx.config import components, reader, schema
from mtx.config.values import conform, describe

ALL = sorted(components.classes().items())


@pytest.mark.parametrize(("name", "cls"), ALL)
def test_every_class_is_a_documented_frozen_dataclass(name, cls):
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__
    assert all(field.kw_only for field in dataclasses.fields(cls))
    for setting in components.settings(cls).values():
        assert setting.doc
        assert setting.drift in (schema.FREE, schema.MATH, schema.DATA, schema.IMPOSSIBLE)
        assert describe(setting)
        # A default that is an object would escape the bindings of its class.
        assert not dataclasses.is_dataclass(setting.default)


@pytest.mark.parametrize(("name", "cls"), ALL)
def test_defaults_keep_their_own_rules(name, cls):
    for setting in components.settings(cls).values():
        if setting.default is not schema.REQUIRED:
            assert conform(setting.default, setting) == setting.default


def test_defaults_exist_and_fit():
    for key, name in components.DEFAULTS.items():
        owner, field = key.split(".")
        setting = components.settings(components.sections()[owner])[field]
        assert components.accepts(setting.annotation, components.components()[name])


def test_a_new_file_is_found(tmp_path, monkeypatch):
    import mtx.optim

    (tmp_path / "novel.py").write_text(
        "from dataclasses import dataclass\nfrom mtx.config.schema import Optimizer, setting\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Novel(Optimizer):\n"
        "    'New.'\n    rate: float = setting(0.5, low=0.0, doc='rate')\n"
        "    def check(self, run):\n        yield f'Novel.rate and {run.train.steps} steps do not go together'\n"
    )
    monkeypatch.setattr(mtx.optim, "__path__", [*mtx.optim.__path__, str(tmp_path)])
    components.components.cache_clear()
    try:
        assert "Novel" in components.components()
        with pytest.raises(reader.UserError, match=r"Novel\.rate and 3 steps do not go together"):
            reader.load_text(
                "Model:\n  vocab_size = 8\n  d_model = 8\n  num_heads = 2\n  num_layers = 1\n  max_seq_len = 8\n"
                "Train:\n  seq_len = 8\n  global_batch_size = 1\n  steps = 3\n  optimizer = @Novel()\n",
                "novel.gin",
            )
    finally:
        components.components.cache_clear()


def test_families_are_files_of_the_models_room():
    assert "decoder" in components.families()
    assert "__init__" not in components.families()
