"""`make demo` without its servers: what it asks, how it judges, what it shows."""

from types import SimpleNamespace

import pytest
from demo import run, show
from demo.questions import Question, chat_turns, late, over_documents, same_words, user
from demo.session import Answer, Session, surprise

QUESTIONS = over_documents()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.right[0])
def test_a_document_tells_the_fact_and_the_question_does_not(question):
    *document, asked = question.messages[0]["content"].splitlines()
    assert question.is_right(" ".join(document)) and not question.is_right(asked)


def test_what_is_asked_about_is_longer_than_the_budget_and_shorter_than_the_servers_take():
    """A word has at least 1.2 tokens here, and fewer than 1.5."""
    texts = [question.messages[0]["content"] for question in QUESTIONS] + [" ".join(chat_turns())]
    for text in texts:
        words = len(text.split())
        assert 1.2 * words > 1.5 * run.BUDGET and 1.5 * words < run.SMALL, text[:40]


def test_only_the_first_turn_of_the_chat_tells_what_the_last_one_asks():
    first, *others = chat_turns()
    history = [user(first), {"role": "assistant", "content": "Good."}]
    question = late(history)
    assert question.messages[:2] == history and question.messages[2:] == [user(others[-1])]
    assert question.is_right(first) and not any(question.is_right(turn) for turn in others)


def test_case_does_not_matter_and_any_of_the_facts_will_do():
    question = Question([user("?")], ("24 pounds", "£24"))
    assert question.is_right("It costs £24.") and question.is_right("24 Pounds") and not question.is_right("240")


def test_same_words_is_a_share_of_both_answers():
    assert same_words("a b c d", "a b c d") == 1 and same_words("a b", "c d") == 0
    assert same_words("it is in Lyon", "now it is Lyon") == 3 / 4


def answer(text: str, *logprobs: float) -> Answer:
    return Answer(text, [7, 8, 9, *range(len(logprobs))], list(logprobs))


def test_the_surprise_is_a_mean_over_tokens():
    assert surprise([[-1.0, -1.0, -1.0], [-5.0]]) == 2


class Client:
    """Of every token of a prompt it says that -log p is its number."""

    def __init__(self) -> None:
        self.completions = self

    def create(self, prompt: list[int], extra_body: dict, **_):
        assert extra_body == {"prompt_logprobs": 0}
        places = [None] + [{str(token): {"logprob": -float(token)}} for token in prompt[1:]]
        return SimpleNamespace(choices=[SimpleNamespace(prompt_logprobs=places)])


def test_only_the_tokens_of_an_answer_count_for_agreement(monkeypatch):
    monkeypatch.setattr(Session, "client", property(lambda self: Client()))
    session = Session(SimpleNamespace(), 2048)
    session.read("momentkv", [answer("", -9.0, -9.0, -9.0), answer("", -9.0)])
    assert session.surprise == (0 + 1 + 2 + 0) / 4


def session(texts: list[str], held: list[int], worse: float) -> Session:
    log = "GPU KV cache size: 2,048 tokens\nMaximum concurrency for 4,096 tokens per request: 4.03x\n"
    growth = [(0.1 * i, float(h)) for i, h in enumerate(held)]
    return Session(SimpleNamespace(log=log), 2048, [answer(t) for t in texts], growth, worse)


def test_the_table_and_the_answers_side_by_side(tmp_path):
    questions = [Question([user("text\nWho?")], ("Ada",)), Question([user("Where?")], ("Rome",))]
    sessions = {
        "stock": session(["Ada did", "In Rome"], [0, 900, 1400], 0.1),
        "momentkv": session(["Bob did", "In Rome"], [0, 512, 500], 0.4),
    }
    heading, stock, ours = show.rows(sessions, questions)
    assert len(heading) == len(stock) == len(ours)
    assert stock == ["stock", "1 of 1", "yes", 1.0, 0.1, 1400, 1400, 2048, "4.03x"]
    assert ours == ["momentkv", "0 of 1", "yes", 0.75, 0.4, 512, 500, 2048, "4.03x"]
    text = show.side_by_side(sessions, questions)
    assert "Who?  [Ada]" in text and "x momentkv      Bob did" in text and "x stock" not in text
    assert show.record(sessions, questions)["answers"][0]["momentkv"] == "Bob did"
    show.plot(sessions, 512, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_stock_in_the_small_pool_must_refuse():
    def ends() -> None:
        raise RuntimeError("vllm serve exited with 1")

    why = "To serve at least one request with the model's max seq len (4096), (0.18 GiB KV cache is needed"
    ended = SimpleNamespace(wait_ready=ends, log=f"x\nValueError: {why}. Try increasing\nRuntimeError: y")
    assert run.refusal(ended) == why
    with pytest.raises(RuntimeError, match="shows nothing"):
        run.refusal(SimpleNamespace(wait_ready=lambda: None, log=""))


def test_without_a_model_it_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(run, "FOLDER", tmp_path / "none")
    assert run.main() == 1
    assert "make real-model" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["demo", "--model", str(tmp_path / "other")])
    assert run.main() == 1
    assert "other is no folder" in capsys.readouterr().err
