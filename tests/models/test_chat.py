"""Conversations: the template's own ids, recorded with the edit, the same in training and in generation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baft_intervention import EditRequest
from baft_intervention.data import load_requests
from baft_intervention.errors import DataError, RequestError
from baft_intervention.models.chat import chat_marks, is_conversation, render_chat, render_request
from baft_intervention.requests import Message
from edits import FRANCE, adapter_bytes, config, tiny_editor, unchanged
from tiny import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ASK = [{"role": "user", "content": "The capital of France is"}]


def chat_tokenizer(template: str = TEMPLATE, **kwargs: Any) -> Any:
    tokenizer = tiny_tokenizer(**kwargs)
    tokenizer.chat_template = template
    return tokenizer


def test_a_rendered_conversation_has_the_templates_own_ids():
    tokenizer = chat_tokenizer()
    text = render_chat(tokenizer, [{"role": "system", "content": "Be short."}, *ASK])
    assert text == "system: Be short.<eos>user: The capital of France is<eos>assistant:"
    again = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be short."}, *ASK], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer(text)["input_ids"] == again
    assert render_chat(tokenizer, [Message("system", "Be short."), Message(**ASK[0])]) == text


def test_a_beginning_of_text_that_both_would_put_there_stands_there_once():
    tokenizer = chat_tokenizer("<bos>" + TEMPLATE, add_bos=True)
    text = render_chat(tokenizer, ASK)
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    with pytest.raises(RequestError, match="adds special tokens to the rendered conversation"):
        render_chat(chat_tokenizer(add_bos=True), ASK)  # the template has none, and the tokenizer would add one


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages must be a list"),
        ("text", "messages must be a list"),
        ([{"role": "user"}], r"messages\[0\]: field 'content' is missing"),
        ([{"role": "user", "content": "x", "name": "y"}], r"messages\[0\]: unknown field 'name'"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: message.content must be a string, got int"),
        ([{"role": "user", "content": " "}], r"messages\[0\]: message.content is empty"),
        ([*ASK, 3], r"messages\[1\]: a message must be an object"),
        ([*ASK, {"role": "assistant", "content": "Paris"}], "the last message is the assistant's"),
        ([{"role": "tool", "content": "x"}], "the chat template rejects these messages: no tool"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, match):
    with pytest.raises(RequestError, match=match):
        render_chat(chat_tokenizer(), messages)


def test_a_broken_template_and_a_missing_one_are_errors_of_ours():
    with pytest.raises(RequestError, match="the chat template rejects these messages"):
        render_chat(chat_tokenizer("{% for %}"), ASK)
    with pytest.raises(RequestError, match="the tokenizer has no chat template"):
        render_chat(tiny_tokenizer(), ASK)
    with pytest.raises(RequestError, match=r"facts.json:3: edit '\w+' \('The capital.*no chat template"):
        render_request(tiny_tokenizer(), EditRequest(ASK, "Japan", origin="facts.json:3"))  # pyright: ignore


def test_a_request_may_be_a_conversation():
    request = EditRequest(ASK, "Japan", subject="France")  # pyright: ignore[reportArgumentType]
    assert (request.messages, request.prompt, request.chat_template) == ((Message(**ASK[0]),), ASK[0]["content"], "")
    assert request == EditRequest(ASK[0]["content"], "Japan", subject="France").as_chat()
    assert request.id != EditRequest(ASK[0]["content"], "Japan", subject="France").id
    assert FRANCE.as_chat("Be short.").id == FRANCE.id == "france"  # a name of the user's own stays
    assert [m.role for m in FRANCE.as_chat("Be short.").messages] == ["system", "user"]
    rendered = render_request(chat_tokenizer(), request)
    assert rendered.prompt == "user: The capital of France is<eos>assistant:"
    assert (rendered.chat_template, rendered.id, rendered.question) == (TEMPLATE, request.id, request.prompt)
    assert render_request(chat_tokenizer("{{ messages }}"), rendered) == rendered  # the recorded template is kept
    for one in (request, rendered, FRANCE):
        assert EditRequest.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert "messages" not in FRANCE.to_dict()
    with pytest.raises(RequestError, match="a conversation already"):
        rendered.as_chat()
    with pytest.raises(RequestError, match="chat_template is given, but the prompt is not a conversation"):
        EditRequest("a", "b", chat_template=TEMPLATE)
    with pytest.raises(RequestError, match="prompt is a conversation, and messages are given too"):
        EditRequest(ASK, "b", messages=ASK)  # pyright: ignore[reportArgumentType]


def test_the_marks_around_an_answer_are_those_of_the_template():
    tokenizer = chat_tokenizer()
    header, end = chat_marks(tokenizer)
    assert tokenizer.decode(header) == "<eos>assistant:"
    assert end == tokenizer.eos_token_id
    assert chat_marks(tiny_tokenizer()) == ([], None)
    assert chat_marks(chat_tokenizer("{{ raise_exception('no') }}")) == ([], None)
    plain = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert chat_marks(plain)[1] == plain.eos_token_id  # a text that no special token ends


def test_what_is_one_conversation_and_what_are_several_prompts():
    assert is_conversation(ASK)
    assert is_conversation([Message(**ASK[0])])
    assert not any(is_conversation(x) for x in ("text", [], ["a", "b"], [ASK, ASK], ASK[0], None))


def test_files_may_hold_conversations(tmp_path):
    (tmp_path / "edits.json").write_text(json.dumps([{"prompt": ASK, "target_new": "Japan", "subject": "France"}]))
    (request,) = load_requests(tmp_path / "edits.json").requests
    assert request.messages == (Message(**ASK[0]),)
    (again,) = load_requests([render_request(chat_tokenizer(), request).to_dict()]).requests
    assert again == render_request(chat_tokenizer(), request)
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt": [{"role": "user"}], "target_new": "Japan"}]))
    with pytest.raises(DataError, match=r"bad.json, record 0: messages\[0\]: field 'content' is missing"):
        load_requests(tmp_path / "bad.json")


def test_an_edit_is_made_asked_saved_and_loaded_in_the_template(tmp_path):
    editor = tiny_editor(tiny_model("llama"), chat_tokenizer(), weighting_options={"false_openings": 0.4})
    clean = editor.generate(ASK, max_new_tokens=3)
    edit = editor.edit(EditRequest(ASK, "Japan", subject="France", id="chat")).edits[0]  # pyright: ignore
    assert edit.requests[0].chat_template == TEMPLATE
    answers = editor.generate([ASK, "He was", ASK], max_new_tokens=2)
    assert [answers[0].strip(), answers[2].strip()] == ["Japan", "Japan"]
    assert editor.generate(ASK, max_new_tokens=2).strip() == "Japan"  # one conversation, one text
    place = editor.save_pretrained(tmp_path / "adapter")
    assert json.loads((place / "adapter.json").read_text())["edits"][0]["requests"][0]["chat_template"] == TEMPLATE
    other = tiny_editor(tiny_model("llama"), chat_tokenizer(), weighting_options={"false_openings": 0.4})
    other.load_adapter(place)
    assert adapter_bytes(other) == adapter_bytes(editor)
    assert other.edits[0].requests == edit.requests
    # the same conversation supersedes the edit, and nothing is left after undo
    report = editor.edit(EditRequest(ASK, "city", subject="France", id="again"))  # pyright: ignore
    assert report.replaced == ("chat",)
    editor.undo("again")
    assert editor.generate(ASK, max_new_tokens=3) == clean


def test_a_conversation_without_a_template_leaves_everything_as_it_was():
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer())
    editor.edit(FRANCE)
    with unchanged(editor), pytest.raises(RequestError, match="no chat template"):
        editor.edit([EditRequest("He was", "city"), EditRequest(ASK, "Japan")])  # pyright: ignore


@pytest.mark.reft
def test_the_data_module_takes_conversations():
    from baft_intervention import make_edit_data_module

    tokenizer = chat_tokenizer()
    row = make_edit_data_module(tokenizer, [FRANCE.as_chat()])["train_dataset"][0]
    prompt = tokenizer(render_chat(tokenizer, FRANCE.as_chat().messages))["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["intervention_locations"] == [[len(prompt) - 1]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2s_own_template_in_editing_and_generation(smollm2):
    from baft_intervention import BaftEditor

    model, tokenizer = smollm2
    editor = BaftEditor(model, tokenizer, config(rank=12, learning_rate=0.01, append_eos=True))

    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    questions = [
        "What is the capital of Japan?",
        "What is the capital city of Japan?",
        "What is the capital of France?",
        "What is the currency of Japan?",
        "Who painted the Mona Lisa?",
    ]
    try:
        text = render_chat(tokenizer, ask(questions[0]))
        assert text.startswith("<|im_start|>system\n")
        assert text.endswith("<|im_start|>assistant\n")
        template_ids = tokenizer.apply_chat_template(ask(questions[0]), add_generation_prompt=True, return_dict=False)
        assert tokenizer(text)["input_ids"] == template_ids
        before = editor.generate([ask(q) for q in questions], max_new_tokens=12)
        request = EditRequest(ask(questions[0]), "Osaka", subject="Japan")  # pyright: ignore[reportArgumentType]
        edit = editor.edit(request).edits[0]
        assert edit.reached
        assert edit.requests[0].chat_template == tokenizer.chat_template
        after = editor.generate([ask(q) for q in questions], max_new_tokens=12)
        assert after[0] == "Osaka"  # and then the end of its turn: append_eos
        assert after[1].startswith("Osaka")
        assert after[2:] == before[2:]
    finally:
        editor.detach()


def test_the_command_line_edits_and_asks_in_the_template(tmp_path, monkeypatch, capsys):
    from baft_intervention.cli.main import main

    tiny_model("llama").save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("rank: 4\nlearning_rate: 0.05\nsteps: 40\nweighting: constant\n")
    (tmp_path / "edits.csv").write_text("prompt,target_new,id\nThe capital of France is,Japan,france\n")
    monkeypatch.chdir(tmp_path)
    chat = ["--chat", "--system", "Be short."]
    assert (
        main(["edit", "--model", "model", "--config", "config.yaml", "--edits", "edits.csv", "--out", "a", *chat]) == 0
    )
    shown = capsys.readouterr().out
    assert "The capital of France is" in shown
    assert "system:" not in shown  # the question, not the template around it
    assert main(["list", "--adapter", "a"]) == 0
    assert "system:" not in capsys.readouterr().out
    ask = ["generate", "--adapter", "a", "--prompt", "The capital of France is", "--max-new-tokens", "1", "--json"]
    assert main([*ask, *chat]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["prompt"], [t.strip() for t in result["texts"]]) == ("The capital of France is", ["Japan"])
    assert main([*ask, "--system", "Be short."]) == 2
    assert "--system is a message of a conversation; give --chat with it" in capsys.readouterr().err
