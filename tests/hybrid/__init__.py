"""A Django project beside, inside and around what is of the other world; `tests.test_hybrid` serves it in four ways.

Its own process sets `BOARD`, the directory of the database, and `CONN_MAX_AGE`.
"""
