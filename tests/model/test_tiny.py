from ftexp.model import fingerprint, tiny


def test_tokenizer_is_lossless_on_any_text():
    tokenizer = tiny.tokenizer()
    for text in ("Ready, I am.", "naïve 한국어 \t\n", "🙂" * 3):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_is_the_same_each_time_whatever_was_drawn_before():
    import torch

    one = fingerprint(tiny.model("eager"))
    torch.rand(5)
    assert fingerprint(tiny.model("eager")) == one


def test_making_it_leaves_the_generator_where_it_was():
    import torch

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny.model("eager")
    assert torch.rand(1) == expected
