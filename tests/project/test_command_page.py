"""docs/command_line.md is what the commands say of themselves."""

from docs_cases import DOCS
from typer.main import get_command

from minillm.cli.command_page import page
from minillm.cli.main import app
from minillm.cli.train_command import TrainOptions

WRITTEN = (DOCS / "command_line.md").read_text("utf-8")


def test_the_page_is_current():
    assert page() == WRITTEN, "write it anew: python -m minillm.cli.command_page docs/command_line.md"


def test_the_page_has_every_command_and_every_default_of_train():
    for name in get_command(app).commands:
        assert f"\n## minillm {name}\n" in WRITTEN
    own = WRITTEN[WRITTEN.index("## minillm train\n") : WRITTEN.index("## minillm generate\n")]
    for name, field in TrainOptions.__dataclass_fields__.items():
        flag = {"settings": "set"}.get(name, name.replace("_", "-"))
        line = next(line for line in own.splitlines() if line.startswith(f"| `--{flag}"))
        default = getattr(field.default, "value", field.default)
        if default is True or default is False:
            default = f"{'' if default else 'no-'}{flag}"
        assert default is None or f"[default: {default}" in line, line
