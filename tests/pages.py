"""What tests of HTML pages share: a reader of their text, and what is done with them in a browser (the fixture ``browser``)."""

from html.parser import HTMLParser

from selenium.webdriver.common.by import By


class Page(HTMLParser):
    """Tags, attributes, and the text outside of style and script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self._inside = [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.text += data if self._inside not in ("style", "script") else ""


def show_at(browser, width, colours):
    """A window of this width, a phone's where it is narrow, with "light" or "dark" colours."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value=colours)])
    )


def assert_fits(page):
    """Nothing is wider than the window."""
    scroll, inner = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert scroll <= inner


def click(page, selector):
    element = page.find_element(By.CSS_SELECTOR, selector)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()
    return element
