"""Answers as pictures, videos, timelines and pages."""
