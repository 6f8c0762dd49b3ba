"""Messages give the tokens that transformers gives them; a template is a program that can do nothing else."""

import json

import pytest

from experiments.common import text
from experiments.common.chat import ChatTemplate
from tests.checkpoints_convert.test_tokenizer_files import begin, save_tokenizer
from tests.experiments.common.test_batch_requests import reader

pytest.importorskip("jinja2", reason="the test extra brings it with transformers, below Python 3.12")

TEMPLATE = """
{%- if messages[0].role == 'system' %}
  [gMASK]{{ messages[0].content | trim }}
{% endif %}
{%- for message in messages if message.role != 'system' %}
  {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role: ' + message.role) }}{% endif %}
  {%- if loop.index > 9 %}{% break %}{% endif %}
<|{{ message.role }}|>{% generation %}{{ message.content }}{% endgeneration %}{{ message | tojson }}
{% endfor -%}
{{ bos_token }}
{%- if add_generation_prompt %}<|assistant|>{{ '<think>' if enable_thinking | default(true) else '</think>' }}{% endif %}
"""
MESSAGES = [
    [{"role": "user", "content": "the cat"}],
    [{"role": "system", "content": " be <brief> "}, {"role": "user", "content": "é\n'quoted'"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "<s>c"}],
]


def checkpoint(directory, template=TEMPLATE, **settings):
    save_tokenizer(directory, begin)
    fields = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "one of several"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_messages_are_written_as_transformers_writes_them(tmp_path, where, kwargs):
    transformers = pytest.importorskip("transformers")
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    directory = {
        "chat_template.jinja": lambda: checkpoint(tmp_path / "model", chat_template="not this"),
        "tokenizer_config.json": lambda: checkpoint(tmp_path / "model", None, chat_template=TEMPLATE),
        "one of several": lambda: checkpoint(tmp_path / "model", None, chat_template=several),
    }[where]()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours, encoder = ChatTemplate(directory, kwargs), text.tokenizer(directory, 300)
    for messages in MESSAGES:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
        assert ours.text(messages) == expected
        tokens = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)
        assert reader(encoder, chat=ours).prompt({"messages": messages}).tolist() == tokens
        of_a_line = reader(encoder, chat=ChatTemplate(directory, {"enable_thinking": not kwargs}))
        settings = {"enable_thinking": True} | kwargs
        assert of_a_line.prompt({"messages": messages, "chat_template_kwargs": settings}).tolist() == tokens


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages: \[\] is not a list of messages"),
        ("hello", "messages: 'hello' is not a list"),
        ([5], "messages: 5 is not an object with a role"),
        ([{"content": "a"}], "is not an object with a role"),
        ([{"role": "robot\x1b", "content": "a"}], r"chat_template\.jinja: the chat template fails: no such role: robot\\x1b"),
        ([{"role": "user", "content": None}, {"role": "user"}], None),
    ],
)
def test_messages_that_cannot_be_are_named(tmp_path, messages, message):
    template = ChatTemplate(checkpoint(tmp_path / "model"), {})
    if message is None:
        assert isinstance(template.text(messages), str)
        return
    with pytest.raises(ValueError, match=message):
        template.text(messages)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_template_reads_what_it_is_given_and_nothing_else(tmp_path, hostile):
    template = ChatTemplate(checkpoint(tmp_path / "model", hostile), {})
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template fails: "):
        template.text(MESSAGES[0])


def test_a_checkpoint_without_a_template_and_one_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="has no chat template, in chat_template.jinja or tokenizer_config.json"):
        ChatTemplate(checkpoint(tmp_path / "none", None), {})
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not a chat template: "):
        ChatTemplate(checkpoint(tmp_path / "broken", "{% if %}"), {})
