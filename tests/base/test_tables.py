from radiance.base.tables import format_table

ROWS = [("name", "images", "share"), ("  folder", "1,024", "4 %"), ("x", 7, "")]


def test_plain_tables_align_columns_and_keep_leading_spaces():
    assert format_table(ROWS, num_text_columns=1).split("\n") == [
        "name      images  share",
        "  folder   1,024    4 %",
        "x              7",
    ]


def test_markdown_tables_have_a_rule_below_the_header():
    assert format_table(ROWS, style="github").split("\n") == [
        "| name   |   images |   share |",
        "|--------|----------|---------|",
        "| folder |    1,024 |     4 % |",
        "| x      |        7 |         |",
    ]


def test_html_tables_escape_cells():
    table = format_table([("a", "b"), ("<script>", 1)], style="html")
    assert "&lt;script&gt;" in table
    assert "<script>" not in table
    assert table.startswith("<table>")
