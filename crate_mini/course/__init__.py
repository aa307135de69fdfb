"""The course: the idea on one page, exercises that grade themselves, a notebook.

`python -m crate_mini.course` lists the exercises. idea.md is the first page, plan.md a class of two
hours; tests/lesson/test_idea.py and tests/course/ hold both to what the code does.

    exercises/   one file for each exercise: text, hints, solution, check
    exercise     reads them; makes the stub that a learner edits
    checking     random cases, comparison, and the diagnosis of common mistakes
    grading      runs a learner's file in a process of its own, with a time limit
    compiled     compiles C++, and CUDA for the emulated device
    notebook     the laboratory class as a Jupyter notebook
"""
