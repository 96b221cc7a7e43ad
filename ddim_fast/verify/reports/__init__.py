"""The results of a verification, for programs and for people.

``report`` is the data, ``write`` its JSON and JUnit XML and its verdict in words, ``write_html`` a
page, ``show`` the display in a terminal or a log.
"""
