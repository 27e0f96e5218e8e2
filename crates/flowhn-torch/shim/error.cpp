#include "shim.h"

#include <string>

static thread_local std::string last_error;

void flowhn::set_last_error(const char* message) {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

extern "C" const char* flowhn_last_error() { return last_error.c_str(); }
