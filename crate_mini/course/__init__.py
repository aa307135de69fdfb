"""The course: the idea on one page. tests/lesson/test_idea.py runs it and checks its claims."""
