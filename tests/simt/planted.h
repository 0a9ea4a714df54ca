// Which of the faults that test_planted_faults.py has written into copies of kernels is there; 0: none.
#pragma once
extern int planted;
