from phd_training.corpus import clean, split


def test_prose_is_unwrapped_and_verse_is_not():
    prose = "\n".join(["It is a truth universally acknowledged, that a single man in"] * 3 + ["want of a wife."])
    verse = "Of Man's first disobedience, and the fruit\nOf that forbidden tree whose mortal taste\nBrought death"
    assert clean(f"{prose}\r\n\r\n\n{verse}") == [prose.replace("\n", " "), verse]


def test_publishers_frames_are_left_out():
    text = "Header\n*** START OF THIS PROJECT GUTENBERG EBOOK ***\n\nText.\n\nCopyright someone\n\n*** END OF THIS BOOK ***\nLicence"
    assert clean(text) == ["Text."]
    assert clean("\u201cIt\u2019s\u2014so\u201d") == ['"It\'s--so"']


def test_nothing_is_on_both_sides():
    paragraphs = [
        f"Paragraph number {i} is long enough to be told from any other paragraph, is it not?" for i in range(500)
    ]
    seen, held_out = set(), []
    kept = split(paragraphs + paragraphs[:100], seen, held_out, every=8, size=300)
    other = split(paragraphs[100:200], seen, held_out, every=8, size=300)
    assert other == ""
    for paragraph in paragraphs:
        assert (paragraph in kept) != any(paragraph in text for text in held_out)
    assert 0.08 < sum(map(len, held_out)) / len(kept) < 0.18
