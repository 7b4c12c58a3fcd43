"""The drawing beside a model card is a whole SVG file that says what the plan says."""

from xml.etree import ElementTree

from lillama.report.card_plot import kept_plot

SVG = "{http://www.w3.org/2000/svg}"


def test_the_plot_is_a_file_that_needs_nothing_else(unfinished):
    content = kept_plot(unfinished)
    tree = ElementTree.fromstring(content)
    assert tree.tag == f"{SVG}svg" and tree.get("aria-label") and tree.find(f"{SVG}style").text
    assert "http" not in content.replace("http://www.w3.org/2000/svg", "") and "<script" not in content


def test_each_linear_of_each_block_tells_its_share(unfinished):
    cells = ElementTree.fromstring(kept_plot(unfinished)).iter(f"{SVG}title")
    q_share = 8 * (32 + 32) / (32 * 32)
    assert [cell.text for cell in cells] == [
        f"{kind}, block {block}: {share:.1%}"
        for kind, share in (("attn.q_proj", q_share), ("mlp.up_proj", 1.0))
        for block in range(3)
    ]
