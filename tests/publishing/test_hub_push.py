"""Uploads to a hub: branches, and whose model card stays."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hub_server import running_hub
from huggingface_hub.errors import HfHubHTTPError
from stranger_cases import tiny, tokenizer

from minillm.publishing.hub import create_branch

LOAD = """
import sys, os
from pathlib import Path
from huggingface_hub import HfApi
from minillm import MiniLLMForCausalLM, MiniLLMTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = MiniLLMForCausalLM.from_pretrained("local"), MiniLLMTokenizer.from_pretrained("local")
objects = {"model": model, "tokenizer": tokenizer, "config": model.config}
api = HfApi()

def upload(text, repo):
    api.create_repo(repo, exist_ok=True)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)
"""


@pytest.fixture
def push(tmp_path):
    """Runs code with `model`, `tokenizer` and `config` against a fresh hub, and returns the hub's folder of `user`.

    In a process of its own, since the client reads the hub's address when it is imported."""
    tiny(attention_type="prefix").save_pretrained(tmp_path / "local")
    tokenizer().save_pretrained(tmp_path / "local")

    def run(code):
        with running_hub(tmp_path / "hub") as environment:
            done = subprocess.run(
                [sys.executable, "-c", LOAD + code],
                cwd=tmp_path,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / "hub" / "user"

    return run


def card(folder):
    return (folder / "README.md").read_text("utf-8") if (folder / "README.md").exists() else None


@pytest.mark.slow
@pytest.mark.mostly_thorough("None")
@pytest.mark.parametrize("revision", [None, "dev"])
def test_the_models_card_stands_in_any_order(revision, push):
    user = push(f"""
for repo, names in (("last", ["tokenizer", "config", "model"]), ("first", ["model", "tokenizer", "config"])):
    for name in names:
        objects[name].push_to_hub("user/" + repo, revision={revision!r})
""")
    for name in ("last", "first"):
        text = card(user / (name if revision is None else f"{name}@{revision}"))
        assert "# MiniLLM model" in text and "both directions" in text and "automatically generated" not in text


@pytest.mark.slow
def test_a_tokenizer_alone_has_no_empty_card_and_tags_are_kept(push):
    user = push("""
tokenizer.push_to_hub("user/alone")
tokenizer.push_to_hub("user/tagged", tags=["one"])
model.config.push_to_hub("user/tagged", tags=["two"])
""")
    assert card(user / "alone") is None and (user / "alone" / "tokenization_minillm.py").exists()
    assert "- one" in card(user / "tagged") and "- two" in card(user / "tagged")


@pytest.mark.slow
def test_a_card_of_ones_own_stays_and_an_empty_one_of_transformers_does_not(push):
    user = push("""
# What a process without MiniLLM uploads:
from transformers.utils.hub import create_and_tag_model_card
upload("---\\ntags: []\\n---\\n# Mine", "user/mine")
api.create_repo("user/stock")
upload(str(create_and_tag_model_card("user/stock")), "user/stock")
assert "automatically generated" in Path(api.hf_hub_download("user/stock", "README.md")).read_text()
for repo in ("user/mine", "user/stock"):
    model.push_to_hub(repo, tags=["extra"])
    tokenizer.push_to_hub(repo)
""")
    assert "# Mine" in card(user / "mine") and "- extra" in card(user / "mine")
    assert "# MiniLLM model" in card(user / "stock") and "- extra" in card(user / "stock")


@pytest.mark.slow
def test_a_new_branch_is_made_and_an_old_one_taken(push):
    user = push("""
upload("---\\ntags: []\\n---\\n# Of main", "user/model")
for _ in range(2):
    model.push_to_hub("user/model", revision="dev")
    tokenizer.push_to_hub("user/model", revision="dev")
model.push_to_hub("user/model", revision="main")
again = AutoModelForCausalLM.from_pretrained("user/model", revision="dev")
assert (again.lm_head.weight == model.lm_head.weight).all()
assert AutoTokenizer.from_pretrained("user/model", revision="dev")("a")["input_ids"] == tokenizer("a")["input_ids"]
assert api.list_repo_files("user/model", revision="dev") != api.list_repo_files("user/model")
try:
    AutoModelForCausalLM.from_pretrained("user/model", revision="nowhere")
except OSError as error:
    assert "nowhere" in str(error)
else:
    raise AssertionError("an unknown revision was loaded")
""")
    # A branch begins as a copy of main.
    assert "# Of main" in card(user / "model@dev")
    assert (user / "model@dev" / "tokenizer.json").exists() and not (user / "model" / "tokenizer.json").exists()


class Refusing:
    """A hub on which the user may not make branches."""

    def __init__(self, status):
        self.status, self.asked = status, []

    def create_branch(self, **options):
        self.asked.append(options["branch"])
        raise HfHubHTTPError("no", response=SimpleNamespace(status_code=self.status, headers={}, request=None))


@pytest.mark.parametrize(
    ("revision", "create_pr", "status", "asked", "raises"),
    [
        (None, False, 403, [], False),
        ("refs/pr/1", False, 403, [], False),
        ("main", True, 403, ["main"], False),
        ("dev", False, 403, ["dev"], True),
        ("dev", True, 500, ["dev"], True),
    ],
    ids=["no-branch", "pull-request", "may-only-propose", "may-not-write", "broken"],
)
def test_a_branch_that_may_not_be_made_is_fatal_unless_a_pull_request_was_asked_for(
    revision, create_pr, status, asked, raises
):
    hub = Refusing(status)
    if raises:
        with pytest.raises(HfHubHTTPError):
            create_branch(hub, "user/model", revision, create_pr)
    else:
        create_branch(hub, "user/model", revision, create_pr)
    assert hub.asked == asked
