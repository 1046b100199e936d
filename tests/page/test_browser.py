"""The page in a real Chromium: nothing asked of the network, nothing out of reach of the keyboard, one click copies."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from hf_compress.page import render_checkpoint, render_family, save_page
from hf_compress.report import inspect_checkpoint
from tests.conftest import tiny_vit
from tests.page.conftest import SHARES, content_of

CHROMIUM = "/usr/bin/chromium" if Path("/usr/bin/chromium").is_file() else shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
HOSTILE = "</script><img src=x onerror='window.hit=1'>"
pytestmark = [
    pytest.mark.xdist_group("page"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: neither /usr/bin/chromium nor one on the PATH"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(family, tmp_path_factory):
    return save_page(family, tmp_path_factory.mktemp("page"))


@pytest.fixture
def open_page(browser, path):
    """Opens a page, and fails at the end if its console said anything or it asked for another file."""
    contexts, problems = [], []

    def open_it(html=None, width=1400, scheme="light", script=None):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=False,
        )
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        file = path if html is None else path.with_name("other.html")
        if html is not None:
            file.write_text(html)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url in (file.as_uri(), "data:,") or problems.append(r.url))
        if script:
            page.add_init_script(script)
        page.goto(file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def points(page):
    """Names of the points that Chart.js draws, those of the Pareto front once."""
    return page.evaluate(
        """() => Chart.getChart('chart').data.datasets.filter((d) => d.type !== 'line')
            .flatMap((d) => d.data.map((p) => p.row.name))"""
    )


def names(page):
    return page.locator("#table tbody tr:visible .pattern").all_text_contents()


def clipboard(page):
    return page.evaluate("navigator.clipboard.readText()")


def test_it_opens_at_once_and_asks_for_nothing(open_page, path):
    page = open_page()
    (timing,) = page.evaluate("performance.getEntriesByType('navigation').map((e) => e.loadEventEnd)")
    assert 0 < timing < 1000
    assert path.stat().st_size < 3_000_000
    expect(page.locator("h1")).to_have_text("twelve")
    assert len(names(page)) == 12
    assert sorted(points(page)) == sorted(names(page))
    assert page.evaluate("getComputedStyle(document.querySelector('.plot canvas')).height") != "0px"


def test_filters_hide_points_and_rows(open_page):
    page = open_page()
    page.get_by_role("checkbox", name="2:4", exact=True).uncheck(force=True)
    assert "2:4" not in points(page)
    assert "2:4" not in names(page)
    kind = page.get_by_role("checkbox", name="N:M")
    assert kind.evaluate("(box) => box.indeterminate")
    page.get_by_role("checkbox", name="unstructured", exact=True).uncheck()
    assert set(points(page)) == {"dense", SHARES[4], "4:8", "int8", "2:4+int8", "low_rank:0.75", "neurons:0.5"}
    expect(page.locator("#count")).to_have_text("7 of 12 shown")
    expect(page.locator("#status")).to_have_text("7 of 12 shown")
    page.get_by_role("checkbox", name="unstructured", exact=True).check()
    assert len(points(page)) == 11


def test_axes_and_metrics_switch(open_page, family):
    page = open_page()
    page.get_by_role("radio", name="Latency").check(force=True)
    page.get_by_role("combobox", name="Metric").select_option("loss")
    expect(page.locator("#chart-title")).to_have_text("loss over latency")
    drawn = page.evaluate(
        "Chart.getChart('chart').data.datasets.flatMap((d) => d.data).filter((p) => p.row.name === '2:4')[0]"
    )
    latency = family["2:4"].latency
    assert drawn["x"] == pytest.approx(latency["milliseconds"] / latency["dense_milliseconds"])
    assert drawn["y"] == pytest.approx(family["2:4"].metrics["loss"])
    assert f"{family['2:4'].metrics['loss']:.4f}" in page.locator("#table").text_content()
    assert "lower loss" in page.locator("#caption").text_content()


def test_the_front_is_what_no_other_one_beats(open_page, family):
    page = open_page()
    page.get_by_role("radio", name="Zipped").check(force=True)
    front = page.evaluate("Chart.getChart('chart').data.datasets[0].data.map((p) => p.row.name)")

    def is_beaten(variant):
        return any(
            other.compressed_bytes <= variant.compressed_bytes
            and other.metrics["accuracy"] >= variant.metrics["accuracy"]
            and (other.compressed_bytes, other.metrics["accuracy"])
            != (variant.compressed_bytes, variant.metrics["accuracy"])
            for other in family.checkpoints
        )

    assert set(front) == {v.pattern or "dense" for v in family.checkpoints if not is_beaten(v)}


def test_one_click_copies(open_page, family):
    page = open_page()
    row = next(row for row in content_of(render_family(family))["rows"] if row["name"] == "low_rank:0.75")
    button = page.get_by_role("button", name="Copy the Python that loads low_rank:0.75")
    button.click()
    expect(page.locator("#status")).to_have_text("Copied the Python that loads low_rank:0.75")
    expect(button).to_have_text("Copied")
    assert clipboard(page) == row["snippet"]
    assert row["snippet"].startswith("import hf_compress\n")
    expect(page.locator("#snippet code")).to_have_text(row["snippet"])


def test_it_copies_where_there_is_no_clipboard(open_page, family):
    page = open_page(script="navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.get_by_role("button", name="Copy the Python that loads 2:4", exact=True).click()
    expect(page.locator("#status")).to_have_text("Copied the Python that loads 2:4")
    assert clipboard(page).endswith('nm-2of4")')
    page.evaluate("document.execCommand = () => false")
    page.get_by_role("button", name="Copy the Python that loads int8", exact=True).click()
    expect(page.locator("#status")).to_contain_text("selected below")
    assert page.evaluate("getSelection().toString().trim()").endswith('int8")')


def test_headers_sort(open_page, family):
    page = open_page()
    page.get_by_role("button", name="zipped").click()
    by_size = [v.pattern or "dense" for v in sorted(family.checkpoints, key=lambda v: v.compressed_bytes)]
    assert names(page) == by_size
    page.get_by_role("button", name="zipped").press("Enter")
    assert names(page) == by_size[::-1]
    assert page.get_by_role("columnheader", name="zipped").get_attribute("aria-sort") == "descending"


def test_everything_is_reached_by_tab_and_works_by_keys(open_page):
    page = open_page()
    reached = set()
    wanted = page.evaluate(
        """() => [...document.querySelectorAll('a, button, select, input, [tabindex="0"]')]
            .filter((e) => e.checkVisibility() && (e.type !== 'radio' || e.checked))
            .map((e, i) => (e.dataset.order = `${i}`))"""
    )
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.order"))
    assert reached == set(wanted)
    chart = page.locator("#chart")
    chart.focus()
    page.keyboard.press("End")
    expect(page.locator("#tooltip")).to_be_visible()
    name = page.locator(".tooltip-title").text_content()
    expect(page.locator("#status")).to_have_text(re.compile(f"{re.escape(name)}: accuracy"))
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith(name)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(f"Copied the Python that loads {name}")
    page.get_by_role("radio", name="Zeros").press("ArrowRight")
    expect(page.locator("#chart-title")).to_have_text("accuracy over removed")
    page.get_by_role("checkbox", name="2:4", exact=True).press("Space")
    assert "2:4" not in points(page)


def test_a_point_tells_all_its_numbers(open_page, family):
    page = open_page()
    place = page.evaluate(
        """() => {
            const chart = Chart.getChart('chart');
            const i = chart.data.datasets.findIndex((d) => d.label === 'low rank');
            const { x, y } = chart.getDatasetMeta(i).data[0];
            return { x, y };
        }"""
    )
    page.locator("#chart").hover(position=place)
    text = page.locator("#tooltip").text_content()
    variant = family["low_rank:0.75"]
    for number in (f"{variant.metrics['accuracy']:.4f}", f"{variant.metrics['loss']:.4f}", f"{variant.macs:,}"):
        assert number in text
    expect(page.locator("tr.marked .pattern")).to_have_text("low_rank:0.75")


@pytest.mark.parametrize("width", [390, 1400])
def test_it_is_never_wider_than_the_window(open_page, width):
    page = open_page(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("Chart.getChart('chart').width") > 280


def test_light_and_dark(open_page):
    def colours(page):
        of = (
            "({ color: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor })"
        )
        return {**page.evaluate(of), "grid": page.evaluate("Chart.getChart('chart').options.scales.y.grid.color")}

    page = open_page(scheme="light")
    light = colours(page)
    dark = colours(open_page(scheme="dark"))
    assert all(light[key] != dark[key] for key in light)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("color => Chart.getChart('chart').options.scales.y.grid.color === color", arg=dark["grid"])
    assert colours(page) == dark


def test_text_of_strangers_runs_nowhere(open_page, family):
    strange = replace(family.variants[0], pattern=HOSTILE, revision=HOSTILE, skipped={"w": HOSTILE}, storage=HOSTILE)
    html = render_family(replace(family, variants=(strange, *family.variants[1:]), method=HOSTILE, repo_id=HOSTILE))
    page = open_page(html)
    expect(page.locator("h1")).to_have_text(HOSTILE)
    assert HOSTILE in names(page)
    page.locator("#chart").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.locator("#table .copy").nth(1).click()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hit") is None
    assert page.locator("#lead a").get_attribute("href").startswith("https://huggingface.co/")


def test_no_metric_no_chart(open_page, family):
    bare = [replace(v, metrics={}, latency=None) for v in family.checkpoints]
    page = open_page(render_family(replace(family, dense=bare[0], variants=tuple(bare[1:]))))
    expect(page.locator("#chart")).not_to_be_visible()
    assert "not measured" in page.locator("#missing").text_content()
    some = [replace(v, latency=None) for v in family.checkpoints]
    page = open_page(render_family(replace(family, dense=some[0], variants=tuple(some[1:]))))
    expect(page.locator("#chart")).to_be_visible()
    page.get_by_role("radio", name="Latency").check(force=True)
    expect(page.locator("#chart")).not_to_be_visible()
    assert page.locator("#missing").text_content().startswith("Latency: not measured.")


def test_a_checkpoint_has_the_same_page(open_page, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "model")
    page = open_page(render_checkpoint(inspect_checkpoint(str(tmp_path / "model"), ["unstructured:0.5", "2:4"])), 390)
    expect(page.locator("#chart-title")).to_have_text("energy kept over zeros")
    assert sorted(points(page)) == ["2:4", "as it is", "unstructured:0.5"]
    assert page.locator("#layers tbody tr").count() == 13
    page.locator("#layers").get_by_role("button", name="layer").click()
    shown = page.locator("#layers .pattern").all_text_contents()
    assert shown == sorted(shown)
    page.get_by_role("button", name="Copy the Python that loads 2:4").click()
    assert 'HfCompressConfig("2:4")' in clipboard(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
